"""BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models (Ben Zaken et al., 2022).

arXiv:2106.10199, section 3.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lightning_peft.adapters.added_bias import AddedBias
from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.structure.frozen import frozen_apart
from lightning_peft.structure.inner_models import head_modules
from lightning_peft.targets.patterns import as_list, match_names, require_matches
from lightning_peft.tensors.weights import is_linear


@dataclass(frozen=True, kw_only=True)
class BitFit(PEFTMethod):
    """Train the biases of the model, and nothing else.

    HF PEFT trains biases in place beside adapters of other methods alone; what it has by itself is :class:`BEFT`.

    Args:
        create_missing: Give linear layers without a bias (but for the output head) one that starts at zero.
        target_modules: Patterns of the modules whose biases are trained; all, if not given.
    """

    name: ClassVar[str] = "bitfit"
    hosts: ClassVar[str] = "all biases; linear layers without one"
    count: ClassVar[str] = "Σ out"

    create_missing: bool = False
    target_modules: list[str] | str | None = None

    def trained(self, model: ModelView) -> Iterable[str]:
        """Return every parameter that is called a bias."""
        chosen = self._chosen(model)
        found = [
            name
            for name in model.parameters
            if name.rpartition(".")[0] in chosen and name.rsplit(".", 1)[-1].endswith("bias")
        ]
        if not found and not self.create_missing:
            raise PEFTError(
                f"BitFit: this {model.kind} has no biases"
                + (f" in target_modules={self.target_modules!r}" if self.target_modules else "")
                + ". BitFit(create_missing=True) gives its linear layers biases that start at zero."
            )
        return found

    def select(self, model: ModelView) -> dict[str, nn.Module]:
        """Return the linear layers that lack a bias, if they are to get one."""
        if not self.create_missing:
            return {}
        heads = head_modules(model)
        return {
            name: module
            for name, module in self._chosen(model).items()
            if is_linear(module) and module.bias is None and id(module) not in heads
        }

    def adapter(self, name: str, module: nn.Module, seed: int) -> AddedBias:
        """Make the bias of the linear layer ``module``."""
        return AddedBias(module)

    def _chosen(self, model: ModelView) -> dict[str, nn.Module]:
        modules = model.modules
        if self.target_modules is None:
            apart = frozen_apart(model)
            return {name: module for name, module in modules.items() if name not in apart.left | apart.copies.keys()}
        patterns = as_list(self.target_modules)
        require_matches(patterns, modules, "target_modules")
        names = set().union(*(match_names(pattern, modules) for pattern in patterns))
        return {name: module for name, module in modules.items() if name in names}
