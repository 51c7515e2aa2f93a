"""LoHa in HF PEFT's format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import nn

from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.view import ModelView
from lightning_peft.formats.counterpart import Counterpart, Shapes, require_numbers, targets_for_hf
from lightning_peft.methods.loha import LoHa, is_factored
from lightning_peft.targets.naming import targets_from


class LoHaInHF(Counterpart):
    """``LOHA`` with one rank and alpha."""

    method = LoHa
    peft_type = "LOHA"
    on_conv1d = False
    convolutions = (nn.Conv1d, nn.Conv2d)
    keys = frozenset({"r", "alpha", "rank_dropout", "module_dropout", "use_effective_conv2d"})
    plain: ClassVar[Mapping[str, tuple[Any, ...]]] = {"rank_pattern": ({}, None), "alpha_pattern": ({}, None)}
    parameters: ClassVar[Mapping[str, str]] = {
        name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
    }

    def parameters_of(self, module: nn.Module, method: LoHa) -> Mapping[str, str]:
        """Return the halves of both products, and their cores where they have some."""
        return {key: key for key in method.shapes(module)} if is_factored(module) else {}

    def config(self, root: ModelView, method: LoHa, hosts: Iterable[str], chosen: Iterable[str]) -> dict[str, Any]:
        """Return the hyper-parameters."""
        return {
            "r": method.r,
            "alpha": method.alpha,
            "use_effective_conv2d": method.use_effective_conv2d,
            "target_modules": targets_for_hf(hosts, root),
        }

    def read(self, root: ModelView, config: Mapping[str, Any], shapes: Shapes, source: str) -> PEFTMethod:
        """Return the LoHa; other ranks or alphas for some modules are refused."""
        require_numbers(config, ("r", "alpha"), source)
        plain = LoHa(
            r=config["r"], alpha=config["alpha"], use_effective_conv2d=bool(config.get("use_effective_conv2d", False))
        )
        return replace(plain, target_modules=targets_from(self.hosts(root, shapes, source, plain), root))
