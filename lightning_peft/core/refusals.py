"""States of a model in which something cannot be done."""

from __future__ import annotations

import sys

from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError


def refuse_merged(model: ModelView, action: str) -> None:
    """Raise :class:`PEFTError` if adapters are merged into the weights of ``model``."""
    if any(slot.merged is not None for _, _, slot in model.slots):
        raise PEFTError(f"Cannot {action}: the adapters are merged into the weights. Call unmerge(model) first.")


def refuse_stand_in(model: ModelView, action: str) -> None:
    """Raise :class:`PEFTError` if somebody has something else in place of the active adapters of ``model``."""
    if any(slot.stand_ins.any for _, _, slot in model.slots):
        raise PEFTError(
            f"Cannot {action} inside of `with disable(model)` or `with adapter_names(model, …)`, of whichever thread. "
            "Leave it first."
        )


def refuse_lazy(model: ModelView) -> None:
    """Raise :class:`PEFTError` if a module of ``model`` takes its shape from what it will be called with."""
    lazy = [name for name, parameter in model.parameters.items() if isinstance(parameter, UninitializedTensorMixin)]
    if lazy:
        raise PEFTError(
            f"{lazy[0]!r} has no shape before its module was called: there is nothing to adapt yet, and frozen "
            "values would be drawn later. Call the model once with an example, then inject."
        )


def refuse_foreign_adapters(model: ModelView) -> None:
    """Raise :class:`PEFTError` if HF PEFT has put adapters into ``model``."""
    # An instance can only exist once its module is imported.
    kinds = [
        getattr(sys.modules.get(module), kind, None)
        for module, kind in (("peft.peft_model", "PeftModel"), ("peft.tuners.tuners_utils", "BaseTunerLayer"))
    ]
    known = tuple(kind for kind in kinds if kind is not None)
    if found := [(name, type(part).__name__) for name, part in model.walked if isinstance(part, known)]:
        where = f"{found[0][0]!r} is its {found[0][1]}" if found[0][0] else f"this is its {found[0][1]}"
        raise PEFTError(
            f"HF PEFT has put adapters into this {model.kind} already: {where}. Take them out with its unload(), or "
            "save them with save_pretrained, and load them into the model as it was before with load_adapter(model, "
            "path)."
        )
