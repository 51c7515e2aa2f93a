"""AdaLoRA in HF PEFT's format.

Here singular values that were taken away stay in the tensors, as zeros, so that a run can go on from them. HF PEFT
leaves them out of its files, whose configuration then says which they were of ``init_r``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.formats.counterpart import PREFIX, Counterpart, Shapes, require_numbers, targets_for_hf
from lightning_peft.formats.counterparts.lora import KEYS, PLAIN
from lightning_peft.methods.adalora import AdaLoRA
from lightning_peft.targets.naming import exceptions, only_here, targets_from
from lightning_peft.tensors.weights import is_conv1d

_OF_LORA: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("use_dora", "use_rslora", "lora_bias"), (False, None)),
    **dict.fromkeys(("trainable_token_indices", "target_parameters", "alpha_pattern"), (None, {}, [])),
}
"""Options of LoRA that AdaLoRA has not here, with the values that change nothing."""
_SAME = ("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight")


class AdaLoRAInHF(Counterpart):
    """``ADALORA``."""

    method = AdaLoRA
    peft_type = "ADALORA"
    keys = (KEYS - _OF_LORA.keys()) | {*_SAME, "total_step", "init_lora_weights"}
    plain: ClassVar[Mapping[str, tuple[Any, ...]]] = {**PLAIN, **_OF_LORA, "init_lora_weights": (True, False)}
    parameters: ClassVar[Mapping[str, str]] = {part: part for part in ("lora_A", "lora_B", "lora_E")}

    def config(self, root: ModelView, method: AdaLoRA, hosts: Iterable[str], chosen: Iterable[str]) -> dict[str, Any]:
        """Return the hyper-parameters."""
        modules, ranks = root.modules, {host: method.rank(host) for host in hosts}
        lower = {host: r for host, r in ranks.items() if r < method.init_r}
        return {
            **{key: getattr(method, key) for key in _SAME},
            # HF PEFT reads no file without one, and uses it in training alone.
            "total_step": method.tinit + method.tfinal + 1,
            "lora_alpha": method.alpha,
            "lora_dropout": method.dropout,
            "target_modules": targets_for_hf(ranks, root),
            "bias": "none",
            "fan_in_fan_out": all(is_conv1d(modules[host]) for host in ranks),
            "rank_pattern": {f"{host}.lora_E": [i < r for i in range(method.init_r)] for host, r in lower.items()}
            or None,
        }

    def read(self, root: ModelView, config: Mapping[str, Any], shapes: Shapes, source: str) -> PEFTMethod:
        """Return the AdaLoRA, with the ranks that are left."""
        require_numbers(config, (*_SAME, "lora_alpha"), source)
        hosts = self.hosts(root, shapes, source)
        ranks = {host: _rank(host, config, shapes, source) for host in hosts}
        return AdaLoRA(
            **{key: config[key] for key in _SAME},
            alpha=config["lora_alpha"],
            dropout=config.get("lora_dropout", 0.0),
            target_modules=targets_from(hosts, root),
            rank_pattern=exceptions(ranks, config["init_r"], only_here),
        )


def _rank(host: str, config: Mapping[str, Any], shapes: Shapes, source: str) -> int:
    """Return how many singular values a file has for ``host``: those that its configuration keeps."""
    kept = (config.get("rank_pattern") or {}).get(f"{host}.lora_E")
    found = shapes[f"{PREFIX}{host}.lora_E"]
    ranks = config["init_r"] if kept is None else kept.count(True) if isinstance(kept, list) else None
    if found != (ranks, 1):
        raise PEFTError(
            f"{source}: the singular values of {host!r} have the shape {list(found)}, which init_r and rank_pattern of "
            "its configuration contradict. It is damaged."
        )
    return found[0]
