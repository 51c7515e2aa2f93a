"""LoRA that starts from a part of the weight (PiSSA, OLoRA) in HF PEFT's format: a plain LoRA of twice the rank.

B A - B0 A0 is [B, -B0] [A; A0]. That is what HF PEFT itself writes when it is given the start, and what every reader
of LoRA applies to the weight as it was. What the halves are stands in this package's own file beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from lightning_peft.adapters.low_rank.principal import is_principal
from lightning_peft.core.adapter import CHILD
from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.formats.counterpart import PREFIX, UNSAID, Shapes
from lightning_peft.formats.counterparts.lora import KEYS, PLAIN, LoRAInHF, changes_base
from lightning_peft.formats.pieces import piece
from lightning_peft.methods.lora import LoRA

_HALVES = {"lora_A.weight": (0, "lora_A", "start_A"), "lora_B.weight": (1, "lora_B", "minus_start_B")}


class LoRAFromWeightInHF(LoRAInHF):
    """``LORA`` of twice the rank."""

    method = LoRA
    keys = KEYS
    plain: ClassVar[Mapping[str, tuple[Any, ...]]] = PLAIN

    def writes(self, method: PEFTMethod) -> bool:
        """Whether ``method`` starts from the weight."""
        return isinstance(method, LoRA) and is_principal(method.init)

    def reads(self, config: Mapping[str, Any]) -> bool:
        """Whether a configuration was written with such a start."""
        return is_principal(str(_said(config)))

    def unsaid(self, method: LoRA) -> dict[str, Any]:
        """Return the start."""
        return {"init": method.init}

    def config(self, root: ModelView, method: LoRA, hosts: Iterable[str], chosen: Iterable[str]) -> dict[str, Any]:
        """Return LoRA's, with twice the rank and an alpha that leaves the scale as it is."""
        return super().config(root, _scaled(method, 2), hosts, chosen)

    def read(self, root: ModelView, config: Mapping[str, Any], shapes: Shapes, source: str) -> PEFTMethod:
        """Return the LoRA."""
        doubled = super().read(root, config, shapes, source)
        assert isinstance(doubled, LoRA)
        if odd := [r for r in (doubled.r, *doubled.rank_pattern.values()) if r % 2]:
            raise PEFTError(
                f"{source}: its configuration has the rank {odd[0]}; an even one was expected, half of it for where "
                f"init={_said(config)!r} started. It is damaged."
            )
        return replace(_scaled(doubled, 0.5), init=str(_said(config)))

    def names(self, root: ModelView, method: LoRA, hosts: Iterable[str], chosen: Iterable[str]) -> dict[str, str]:
        """Return the halves of the tensors."""
        found = {}
        for host in hosts:
            r, _ = method.rank_and_alpha(host)
            for suffix, (dim, *halves) in _HALVES.items():
                for position, half in enumerate(halves):
                    in_file = piece(f"{PREFIX}{host}.{suffix}", dim, position * r, (position + 1) * r)
                    found[in_file] = f"{host}.{CHILD}.{half}"
        return found


class UnconvertedLoRAInHF(LoRAInHF):
    """``LORA`` as HF PEFT leaves it if it is not given the start: it works the start out of the base again."""

    method = LoRA
    keys = KEYS | {"init_lora_weights"}
    plain: ClassVar[Mapping[str, tuple[Any, ...]]] = {k: v for k, v in PLAIN.items() if k != "init_lora_weights"}

    def writes(self, method: PEFTMethod) -> bool:
        """Never: other readers of LoRA would take the start for a part of the change."""
        return False

    def reads(self, config: Mapping[str, Any]) -> bool:
        """Whether a configuration names such a start, and does not come from here."""
        return changes_base(config.get("init_lora_weights")) and not config.get("use_dora") and UNSAID not in config

    def read(self, root: ModelView, config: Mapping[str, Any], shapes: Shapes, source: str) -> PEFTMethod:
        """Return the LoRA, whose adapters find the start in the weights of ``root``."""
        init = str(config["init_lora_weights"])
        if init == "loftq":
            raise PEFTError(
                f"{source} was trained from init_lora_weights='loftq', beside weights that HF PEFT had quantised and "
                "changed to what that left of them: beside others its outputs are others. Make a plain model of it "
                "there, by PeftModel.from_pretrained(base, path).merge_and_unload()."
            )
        if init not in ("pissa", "olora"):
            raise PEFTError(
                f"{source} was trained from init_lora_weights={init!r}, whose start HF PEFT took out of the weights "
                "and this file does not hold, nor can it be worked out again: no reader can tell what was trained. "
                "Write it as plain LoRA there, by save_pretrained(..., path_initial_model_for_weight_conversion=...)."
            )
        plain = super().read(root, {**config, "init_lora_weights": True}, shapes, source)
        assert isinstance(plain, LoRA)
        return replace(plain, init=init)


def _said(config: Mapping[str, Any]) -> Any:
    unsaid = config.get(UNSAID)
    return unsaid.get("init") if isinstance(unsaid, Mapping) else None


def _scaled(method: LoRA, factor: float) -> LoRA:
    """Return ``method`` with ``factor`` times the ranks and the same scales."""
    other = math.sqrt(factor) if method.use_rslora else factor

    def alpha(value: float) -> float:
        # Fifteen digits: the way there and back gives the same number.
        return float(f"{value * other:.15g}")

    return replace(
        method,
        r=int(method.r * factor),
        alpha=alpha(method.alpha),
        rank_pattern={name: int(r * factor) for name, r in method.rank_pattern.items()},
        alpha_pattern={name: alpha(value) for name, value in method.alpha_pattern.items()},
        init="kaiming",
    )
