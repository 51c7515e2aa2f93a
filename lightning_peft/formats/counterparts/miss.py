"""MiSS in HF PEFT's format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.view import ModelView
from lightning_peft.formats.counterpart import Counterpart, Shapes, require_numbers, targets_for_hf
from lightning_peft.methods.miss import MiSS
from lightning_peft.targets.naming import targets_from


class MiSSInHF(Counterpart):
    """``MISS``, but for its variant ``bat``, whose change depends on the weight."""

    method = MiSS
    peft_type = "MISS"
    on_conv1d = False
    keys = frozenset({"r", "mini_r", "miss_dropout"})
    plain: ClassVar[Mapping[str, tuple[Any, ...]]] = {"bias": ("none",), "init_weights": (True, False, "mini")}
    parameters: ClassVar[Mapping[str, str]] = {"miss_block": "miss_block"}

    def config(self, root: ModelView, method: MiSS, hosts: Iterable[str], chosen: Iterable[str]) -> dict[str, Any]:
        """Return the hyper-parameters."""
        return {
            "r": method.r,
            "mini_r": method.mini_r or 1,
            "init_weights": True if method.mini_r is None else "mini",
            "miss_dropout": method.dropout,
            "target_modules": targets_for_hf(hosts, root),
            "bias": "none",
        }

    def read(self, root: ModelView, config: Mapping[str, Any], shapes: Shapes, source: str) -> PEFTMethod:
        """Return the MiSS."""
        require_numbers(config, ("r",), source)
        return MiSS(
            r=config["r"],
            mini_r=config.get("mini_r", 1) if config.get("init_weights") == "mini" else None,
            dropout=config.get("miss_dropout", 0.0),
            target_modules=targets_from(self.hosts(root, shapes, source), root),
        )
