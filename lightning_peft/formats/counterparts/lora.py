"""LoRA in HF PEFT's format."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lightning_peft.errors import PEFTError
from lightning_peft.formats.counterpart import (
    PREFIX,
    Counterpart,
    Shapes,
    require_numbers,
    targets_for_hf,
    targets_from,
)
from lightning_peft.method import PEFTMethod
from lightning_peft.methods.lora import LoRA
from lightning_peft.select import fullmatch, named_modules
from lightning_peft.weights import is_conv1d

_LINEAR = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B"}
_EMBEDDING = {"lora_embedding_A": "lora_A", "lora_embedding_B": "lora_B"}

# Keys that change what the tensors mean, with the values that leave them plain LoRA.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    **dict.fromkeys(
        (
            *("lora_bias", "layer_replication", "target_parameters", "trainable_token_indices"),
            *("use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config"),
            *("monteclora_config", "megatron_config"),
        ),
        (False, None, {}, []),
    ),
}


@dataclass(frozen=True)
class LowRank:
    """One module's LoRA in a file: its change of the weight is ``scale`` · B A."""

    a: str
    """Name of A ``[r, in]`` in the file."""
    b: str
    """Name of B ``[out, r]`` in the file."""
    r: int
    scale: float


class LoRAInHF(Counterpart):
    """``LORA`` without DoRA, biases and the like."""

    use_dora: ClassVar[bool] = False

    method: ClassVar[type[LoRA]] = LoRA
    peft_type = "LORA"
    parameters: ClassVar[Mapping[str, str]] = {**_LINEAR, **_EMBEDDING}

    def reads(self, config: Mapping[str, Any]) -> bool:
        """Tell LoRA and DoRA apart."""
        return bool(config.get("use_dora", False)) == self.use_dora

    def parameters_of(self, module: nn.Module, method: Any) -> Mapping[str, str]:
        """Return other names for embeddings."""
        return _EMBEDDING if isinstance(module, nn.Embedding) else _LINEAR

    def config(self, root: nn.Module, method: LoRA, hosts: Iterable[str], chosen: Iterable[str]) -> dict[str, Any]:
        """Return the most common rank and alpha, and the others as patterns."""
        modules = named_modules(root)
        pairs = {host: method.rank_and_alpha(host) for host in hosts}
        r = Counter(rank for rank, _ in pairs.values()).most_common(1)[0][0]
        alpha = Counter(alpha for _, alpha in pairs.values()).most_common(1)[0][0]
        return {
            "r": r,
            "lora_alpha": alpha,
            "lora_dropout": method.dropout,
            "target_modules": targets_for_hf(pairs, root),
            "rank_pattern": {host: rank for host, (rank, _) in pairs.items() if rank != r},
            "alpha_pattern": {host: value for host, (_, value) in pairs.items() if value != alpha},
            "use_rslora": method.use_rslora,
            "use_dora": self.use_dora,
            "bias": "none",
            "fan_in_fan_out": all(is_conv1d(modules[host]) for host in pairs),
            "init_lora_weights": "gaussian" if method.init == "gaussian" else True,
        }

    def read(self, root: nn.Module, config: Mapping[str, Any], shapes: Shapes, source: str) -> PEFTMethod:
        """Return the LoRA; refuse what is not plain."""
        _refuse_unknown(config, source)
        modules = named_modules(root)
        hosts = self.hosts(root, shapes, source)
        ranks, alphas = {}, {}
        for host in hosts:
            ranks[host] = _pattern(config, "rank_pattern", "r", host, source)
            alphas[host] = _pattern(config, "alpha_pattern", "lora_alpha", host, source)
            self._check_shapes(host, modules[host], ranks[host], shapes, source)
        return self.method(
            r=config["r"],
            alpha=config["lora_alpha"],
            dropout=config.get("lora_dropout", 0.0),
            target_modules=targets_from(hosts, root),
            rank_pattern={host: rank for host, rank in ranks.items() if rank != config["r"]},
            alpha_pattern={host: alpha for host, alpha in alphas.items() if alpha != config["lora_alpha"]},
            use_rslora=bool(config.get("use_rslora", False)),
        )

    def _check_shapes(self, host: str, module: nn.Module, r: int, shapes: Shapes, source: str) -> None:
        kind = next((kind for kind in self.method.kinds if kind.serves(module)), None)
        if kind is None:
            raise PEFTError(
                f"{source} adapts {host!r}, which is a {type(module).__name__} here. Load its own base model."
            )
        shapes_here = kind.shapes(module, r)
        for suffix, parameter in self.parameters_of(module, None).items():
            expected = shapes_here[parameter]
            given = shapes.get(f"{PREFIX}{host}.{suffix}")
            if given != expected:
                raise PEFTError(
                    f"{source}: {host}.{suffix} has the shape {given}; rank {r} of its configuration and this model's "
                    f"{type(module).__name__} make {expected}. It belongs to another base model, or is damaged."
                )


def read_low_rank(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], source: str
) -> tuple[dict[str, LowRank], list[str]]:
    """Read configuration and tensor names without the model that they are for.

    Returns:
        The low-rank change of every adapted module by its name, and the names of all other tensors.

    Raises:
        PEFTError: The file is no plain LoRA, or configuration and tensors contradict each other.
    """
    reader = LoRAInHF()
    if config.get("peft_type") != reader.peft_type:
        raise PEFTError(f"{source} is an adapter of type {config.get('peft_type')!r}; {reader.peft_type} can be read.")
    if not reader.reads(config):
        raise PEFTError(f"{source} uses use_dora={config['use_dora']!r}, which is not plain LoRA.")
    _refuse_unknown(config, source)
    grouped = reader.grouped(shapes, source)
    found = {}
    for host, kinds in sorted(grouped.items()):
        if kinds not in ({*_LINEAR}, {*_EMBEDDING}):
            raise PEFTError(f"{source}: {host!r} has {', '.join(sorted(kinds))} alone; A and B were expected.")
        r = _pattern(config, "rank_pattern", "r", host, source)
        alpha = _pattern(config, "alpha_pattern", "lora_alpha", host, source)
        a, b = (f"{PREFIX}{host}.{kind}" for kind in (_LINEAR if kinds == {*_LINEAR} else _EMBEDDING))
        if len(shapes[a]) > 2:
            raise PEFTError(f"{source} adapts {host!r}, a convolution: servers for LoRA take linear layers only.")
        if len(shapes[a]) != 2 or len(shapes[b]) != 2 or not shapes[a][0] == shapes[b][1] == r or r < 1:
            raise PEFTError(
                f"{source}: A and B of {host!r} have the shapes {shapes[a]} and {shapes[b]}; the rank {r} of "
                f"the configuration makes ({r}, in) and (out, {r}). The directory is damaged; take another copy."
            )
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise PEFTError(f"{source}: the configuration gives {host!r} the alpha {alpha!r}; a number was expected.")
        found[host] = LowRank(a, b, r, alpha / (math.sqrt(r) if config.get("use_rslora") else r))
    return found, [name for name in shapes if not reader.owns(name)]


def _refuse_unknown(config: Mapping[str, Any], source: str) -> None:
    require_numbers(config, ("r", "lora_alpha"), source)
    for key, plain in _PLAIN.items():
        if key in config and config[key] not in plain:
            raise PEFTError(f"{source} uses {key}={config[key]!r}, which is not plain LoRA and cannot be read.")


def _pattern(config: Mapping[str, Any], patterns: str, default: str, host: str, source: str) -> Any:
    table = config.get(patterns) or {}
    if not isinstance(table, dict):
        raise PEFTError(f"{source}: its configuration has {patterns}={table!r}; an object was expected.")
    if host in table:
        return table[host]
    return next((value for key, value in table.items() if fullmatch(rf"(?:.*\.)?(?:{key})", host)), config[default])
