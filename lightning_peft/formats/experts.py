"""LoRA of experts that are modules, as in transformers 4, where they stand in one parameter, as in transformers 5.

A file for ``experts.3.w1`` holds A ``[r, in]`` and B ``[out, r]`` of each expert. Where the experts stand in one
parameter there is one A ``[experts · r, in]`` and one B ``[out, r · experts]``. Gate and up, which are one matrix
there, become one change of their ranks together: A on A, and B beside B, with zeros elsewhere.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import regex
from torch import Tensor, nn

from lightning_peft.adapters.low_rank.own_weights import factor_shapes, is_in_first, own_weights
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.formats.configuration import refuse_many_patterns
from lightning_peft.formats.counterpart import PREFIX
from lightning_peft.formats.counterparts.lora import rank_and_alpha, scale_of
from lightning_peft.formats.own_weights import tensors_of
from lightning_peft.structure.experts import expert_weights

_OF_AN_EXPERT = regex.compile(r"(?P<around>.+)\.experts\.(?P<index>\d+)\.(?P<layer>[^.]+)\.(?P<ending>.+)")
_ENDINGS = ("lora_A.weight", "lora_B.weight")
_HALVES = {"w1": 0, "gate_proj": 0, "w3": 1, "up_proj": 1}
"""Of the parameter ``gate_up_proj``, by the name of the layer, which Mixtral numbers."""

_Parts = dict[tuple[int, int], tuple[Tensor, Tensor, float]]
"""A, B and scale by the expert, and by the half of its matrix."""


def with_experts_joined(
    root: ModelView, config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a file's configuration and tensors, those of a module per expert as of one parameter if ``root`` has that.

    Experts of lower ranks than others, or without an adapter, have zeros, which no training moves.

    Raises:
        PEFTError: An expert has more than A and B, or other shapes or a higher number than those of ``root``.
    """
    homes = _homes(root, tensors) if config.get("peft_type") == "LORA" else {}
    if not homes:
        return dict(config), dict(tensors)
    if config.get("lora_dropout"):
        warnings.warn(
            f"{source}: lora_dropout={config['lora_dropout']} is left out, since its experts stand in one parameter "
            "here: there is no low-rank term to drop inputs of. Outputs are the same; training on differs.",
            stacklevel=2,
        )
    values, left, parts = _Values(config, tensors, source), {}, dict[tuple[str, str], _Parts]()
    for name, tensor in tensors.items():
        found = _OF_AN_EXPERT.fullmatch(name.removeprefix(PREFIX))
        around = next((around for around in homes if name.startswith(f"{PREFIX}{around}.")), None)
        if around is None:
            left[name] = tensor
        elif found is None or found["around"] != around:
            renamed = f"{homes[around]}{name.removeprefix(PREFIX + around)}"
            left[f"{PREFIX}{renamed}"] = tensor
            values.move(root, name.removeprefix(PREFIX), renamed)
        else:
            weight, at, part = _part(root, homes[around], found, tensors, values)
            parts.setdefault((f"{homes[around]}.experts", weight), {})[at] = part
    for (host, weight), of_it in parts.items():
        adapted = [key for key in own_weights(root.modules[host]) if (host, key) in parts]
        endings = tensors_of(root.modules[host], adapted).items()
        names = {parameter: f"{PREFIX}{host}.{ending}" for ending, parameter in endings}
        a, b, r, scale = _joined(root.modules[host], weight, of_it)
        left[names[f"factors.{weight}.lora_A"]], left[names[f"factors.{weight}.lora_B"]] = a, b
        values.put(f"{host}.{weight}", r, scale, of_parameter=True)
    return values.config(), left


class _Values:
    """A configuration with ranks and alphas under new names."""

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str) -> None:
        self.source = source
        self._config = config
        self._parameters = list(config.get("target_parameters") or ())
        hosts = {name.removeprefix(PREFIX).removesuffix(f".{_ENDINGS[0]}") for name in tensors}
        patterns = [config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")]
        for table in patterns:
            refuse_many_patterns(table, dict.fromkeys(hosts), source)
        # Whole names of experts name nothing any more.
        self._ranks, self._alphas = (
            {
                key: value
                for key, value in table.items()
                if not (key in hosts and _OF_AN_EXPERT.fullmatch(f"{key}.{_ENDINGS[0]}"))
            }
            for table in patterns
        )

    def of(self, host: str) -> tuple[int, float]:
        """Return the rank and the scale that the file gives ``host``."""
        r, alpha = rank_and_alpha(self._config, host, self.source)
        return r, scale_of(self._config, r, alpha)

    def move(self, root: ModelView, old: str, new: str) -> None:
        """Give a neighbour of experts its own values, of which ``old`` is a tensor and ``new`` its name today."""
        if not old.endswith(_ENDINGS[0]):
            return
        host, new = old.removesuffix(f".{_ENDINGS[0]}"), new.removesuffix(f".{_ENDINGS[0]}")
        of_parameter = new in root.modules and "weight" in own_weights(root.modules[new])
        self.put(f"{new}.weight" if of_parameter else new, *self.of(host), of_parameter=of_parameter)

    def put(self, name: str, r: int, scale: float, *, of_parameter: bool) -> None:
        self._ranks[name] = r
        self._alphas[name] = scale * (math.sqrt(r) if self._config.get("use_rslora") else r)
        self._parameters += [name] if of_parameter else []

    def config(self) -> dict[str, Any]:
        patterns = {"rank_pattern": self._ranks, "alpha_pattern": self._alphas}
        return {**self._config, **patterns, "target_parameters": self._parameters, "lora_dropout": 0.0}


def _homes(root: ModelView, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return what is around experts in the file, with what is around those in one parameter that take their place.

    Only the last name may differ: transformers 4 called Mixtral's ``block_sparse_moe``.
    """
    holders = {name.rpartition(".")[0].rpartition(".")[0] for name in expert_weights(root)}
    found = (_OF_AN_EXPERT.fullmatch(name.removeprefix(PREFIX)) for name in tensors)
    homes = {}
    for around in dict.fromkeys(match["around"] for match in found if match is not None):
        beside = [name for name in holders if name.rpartition(".")[0] == around.rpartition(".")[0]]
        if around in holders:
            homes[around] = around
        elif len(beside) == 1 and around not in root.modules:
            homes[around] = beside[0]
    return homes


def _part(
    root: ModelView, home: str, found: regex.Match[str], tensors: Mapping[str, Tensor], values: _Values
) -> tuple[str, tuple[int, int], tuple[Tensor, Tensor, float]]:
    """Return the parameter that an expert's layer is a part of, where in it, and the layer's A, B and scale."""
    module, layer, index = root.modules[f"{home}.experts"], found["layer"], int(found["index"])
    host, (weight, half, halves) = f"{found['around']}.experts.{index}.{layer}", _place(module, layer)
    if found["ending"] not in _ENDINGS:
        raise PEFTError(
            f"{values.source}: {host!r} has a {found['ending']}, which cannot be put into {home}.experts, where all "
            "experts are one: A and B of plain LoRA alone can. Merge it where it was trained."
        )
    if weight is None or is_in_first(module) or not getattr(module, "is_concatenated", True):
        raise PEFTError(
            f"{values.source} adapts {host!r}; {home}.experts is a {type(module).__name__}, which has no such layer."
        )
    a, b = (tensors.get(f"{PREFIX}{host}.{ending}") for ending in _ENDINGS)
    (r, scale), (count, d_in), (d_out, _) = values.of(host), *factor_shapes(module, weight, 1)
    shapes = None if a is None or b is None else (tuple(a.shape), tuple(b.shape))
    if a is None or b is None or index >= count or shapes != ((r, d_in), (d_out // halves, r)):
        raise PEFTError(
            f"{values.source}: A and B of {host!r} have the shapes {shapes}; rank {r} of its configuration and one of "
            f"the {count} experts of {home}.experts make {((r, d_in), (d_out // halves, r))}. It belongs to another "
            "base model, or is damaged."
        )
    return weight, (index, half), (a, b, scale)


def _place(module: nn.Module, layer: str) -> tuple[str | None, int, int]:
    """Return the parameter that holds ``layer`` of each expert, which half of it, and of how many parts."""
    present = own_weights(module)
    if layer in present:
        return layer, 0, 1
    weight = "gate_up_proj" if layer in _HALVES else {"w2": "down_proj"}.get(layer)
    return (weight, _HALVES.get(layer, 0), 1 + (layer in _HALVES)) if weight in present else (None, 0, 1)


def _joined(module: nn.Module, weight: str, parts: _Parts) -> tuple[Tensor, Tensor, int, float]:
    """Return A, B, rank and scale of a parameter that holds all experts."""
    (count, d_in), (d_out, _) = factor_shapes(module, weight, 1)
    halves = sorted({half for _, half in parts})
    most = {half: max(len(a) for (_, of), (a, _, _) in parts.items() if of == half) for half in halves}
    first = {half: sum(most[other] for other in halves if other < half) for half in halves}
    (some, _, _), r = next(iter(parts.values())), sum(most.values())
    scale = max((own for _, _, own in parts.values()), key=abs)
    a_of, b_of = some.new_zeros(count, r, d_in), some.new_zeros(count, d_out, r)
    for (index, half), (a, b, own) in parts.items():
        columns = slice(first[half], first[half] + len(a))
        a_of[index, columns] = a
        b_of[index, half * len(b) : (half + 1) * len(b), columns] = b if own == scale else b.double() * (own / scale)
    return a_of.flatten(0, 1), b_of.permute(1, 2, 0).flatten(1).contiguous(), r, scale
