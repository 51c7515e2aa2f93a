"""LoKr in HF PEFT's format: which tensors there are depends on the hyper-parameters and the shape of the layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import nn

from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.formats.counterpart import Counterpart, Shapes, require_numbers, targets_for_hf
from lightning_peft.methods.loha import is_factored
from lightning_peft.methods.lokr import LoKr
from lightning_peft.targets.naming import targets_from


class LoKrInHF(Counterpart):
    """``LOKR`` with one rank and alpha."""

    method = LoKr
    peft_type = "LOKR"
    on_conv1d = False
    convolutions = (nn.Conv1d, nn.Conv2d)
    keys = frozenset(
        {
            "r",
            "alpha",
            "rank_dropout",
            "module_dropout",
            "use_effective_conv2d",
            "decompose_both",
            "decompose_factor",
            "rank_dropout_scale",
        }
    )
    plain: ClassVar[Mapping[str, tuple[Any, ...]]] = {"rank_pattern": ({}, None), "alpha_pattern": ({}, None)}
    parameters: ClassVar[Mapping[str, str]] = {
        "lokr_t2": "lokr_t2",
        **{f"{factor}{half}": f"{factor}{half}" for factor in ("lokr_w1", "lokr_w2") for half in ("", "_a", "_b")},
    }

    def parameters_of(self, module: nn.Module, method: LoKr) -> Mapping[str, str]:
        """Return the factors, or their halves, and the core of W2."""
        return {key: key for key in method.parameters_of(module)} if is_factored(module) else {}

    def config(self, root: ModelView, method: LoKr, hosts: Iterable[str], chosen: Iterable[str]) -> dict[str, Any]:
        """Return the hyper-parameters."""
        return {
            "r": method.r,
            "alpha": method.alpha,
            "decompose_both": method.decompose_both,
            "decompose_factor": method.decompose_factor,
            "use_effective_conv2d": method.use_effective_conv2d,
            "target_modules": targets_for_hf(hosts, root),
        }

    def read(self, root: ModelView, config: Mapping[str, Any], shapes: Shapes, source: str) -> PEFTMethod:
        """Return the LoKr; other ranks or alphas for some modules are refused."""
        require_numbers(config, ("r", "alpha"), source)
        both = config.get("decompose_both", False)
        if not isinstance(both, bool):
            raise PEFTError(f"{source}: its configuration has decompose_both={both!r}; true or false was expected.")
        plain = LoKr(
            r=config["r"],
            alpha=config["alpha"],
            decompose_both=both,
            decompose_factor=config.get("decompose_factor", -1),
            use_effective_conv2d=bool(config.get("use_effective_conv2d", False)),
        )
        return replace(plain, target_modules=targets_from(self.hosts(root, shapes, source, plain), root))
