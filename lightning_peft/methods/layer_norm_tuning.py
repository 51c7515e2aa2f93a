"""Layer-norm tuning: Tuning LayerNorm in Attention (Zhao et al., 2023), arXiv:2312.11420, section 3."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.structure.blocks import layer_norms
from lightning_peft.structure.frozen import frozen_apart
from lightning_peft.targets.patterns import as_list, match_names, require_matches


@dataclass(frozen=True, kw_only=True)
class LayerNormTuning(PEFTMethod):
    """Train the LayerNorms and RMSNorms of the model, and nothing else.

    Args:
        target_modules: Patterns of the norms to train; all, if not given.
    """

    name: ClassVar[str] = "layer_norm_tuning"
    hosts: ClassVar[str] = "LayerNorm, RMSNorm"
    count: ClassVar[str] = "Σ d (RMSNorm), 2d (LayerNorm)"

    target_modules: list[str] | str | None = None

    def trained(self, model: ModelView) -> Iterable[str]:
        """Return weight and bias of every norm."""
        norms = layer_norms(model)
        if not norms:
            raise PEFTError(
                f"LayerNormTuning: this {model.kind} has no LayerNorm or RMSNorm with weights. Take another "
                "method, or train other modules with train_also."
            )
        if self.target_modules is None:
            apart = frozen_apart(model)
            norms = {name: norm for name, norm in norms.items() if name not in apart.left | apart.copies.keys()}
        else:
            patterns = as_list(self.target_modules)
            require_matches(patterns, norms, "target_modules")
            names = set().union(*(match_names(pattern, norms) for pattern in patterns))
            norms = {name: norm for name, norm in norms.items() if name in names}
        return [f"{n}.{p}".lstrip(".") for n, norm in norms.items() for p, _ in norm.named_parameters(recurse=False)]
