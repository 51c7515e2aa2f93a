"""Full fine-tuning: everything is trained. The baseline that the methods are compared with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.tensors.packed import is_packed


@dataclass(frozen=True, kw_only=True)
class FullFinetuning(PEFTMethod):
    """Train every parameter that the model itself trains. A copy of the old values is kept in host memory for eject.

    What a callback or a hook unfreezes later is trained and saved as well.
    """

    name: ClassVar[str] = "full_finetuning"
    hosts: ClassVar[str] = "everything"
    count: ClassVar[str] = "all"
    everything: ClassVar[bool] = True

    def trained(self, model: ModelView) -> Iterable[str]:
        """Return the parameters that are not frozen in ``model`` already.

        Raises:
            PEFTError: A weight is quantised.
        """
        if packed := next((name for name, module in model.modules.items() if is_packed(module)), None):
            raise PEFTError(
                f"FullFinetuning trains every weight, and that of {packed!r} is quantised, so that no gradient reaches "
                "it. Load the model in a floating-point dtype, or train adapters beside it, such as LoRA()."
            )
        found = [name for name, p in model.parameters.items() if p.requires_grad and p.is_floating_point()]
        if not found:
            model.remark(
                f"FullFinetuning: every parameter of this {model.kind} is frozen (requires_grad=False), or holds no "
                "floating-point numbers: nothing is trained until something is unfrozen."
            )
        return found
