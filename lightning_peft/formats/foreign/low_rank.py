"""A LoRA of another tool in the terms of HF PEFT's files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import regex
from torch import Tensor

from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.formats.counterpart import PREFIX, targets_for_hf
from lightning_peft.targets.naming import exceptions
from lightning_peft.tensors.weights import is_conv, is_linear


@dataclass(frozen=True)
class ForeignLoRA:
    """What a LoRA of another tool is; names are those of the model that it is given."""

    r: int
    alpha: float
    """The change of a weight is ``alpha / r`` · B A."""
    dropout: float
    factors: Mapping[str, tuple[Tensor, Tensor]]
    """A ``[r, in]`` and B ``[out, r]`` by the module's name; beside a convolution with its kernel, and of ones."""
    magnitudes: Mapping[str, Tensor]
    """Of a DoRA, m ``[out]`` likewise; else nothing."""
    alphas: Mapping[str, float] = field(default_factory=dict)
    """By the module's name where it is another one."""

    def as_files(self, root: ModelView, source: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the configuration and the tensors of HF PEFT's directory.

        Raises:
            PEFTError: ``root`` has no such layers.
        """
        for name, (a, _) in self.factors.items():
            module = root.modules.get(name)
            if module is None or not (is_conv(module) if a.dim() > 2 else is_linear(module)):
                what = "does not have" if module is None else f"has a {type(module).__name__} for"
                raise PEFTError(
                    f"{source} adapts {name!r}, which this {root.kind} {what}: only linear layers and convolutions, by "
                    "the names that the base gives them, are taken over. Name the model that the adapter was trained "
                    "on."
                )
        tensors: dict[str, Tensor] = {}
        for name, (a, b) in self.factors.items():
            tensors |= {f"{PREFIX}{name}.lora_A.weight": a, f"{PREFIX}{name}.lora_B.weight": b}
        tensors |= {f"{PREFIX}{name}.lora_magnitude_vector": m for name, m in self.magnitudes.items()}
        config = {
            "peft_type": "LORA",
            "r": self.r,
            "lora_alpha": self.alpha,
            "rank_pattern": exceptions({name: len(a) for name, (a, _) in self.factors.items()}, self.r, _only_here),
            "alpha_pattern": exceptions(
                {n: self.alphas.get(n, self.alpha) for n in self.factors}, self.alpha, _only_here
            ),
            "lora_dropout": self.dropout,
            "target_modules": targets_for_hf(self.factors, root),
            "bias": "none",
            "use_dora": bool(self.magnitudes),
        }
        return config, tensors


def _only_here(name: str) -> str:
    """Return a pattern as HF PEFT reads it for the module ``name`` and none whose name ends in it."""
    return f"^{regex.escape(name)}"
