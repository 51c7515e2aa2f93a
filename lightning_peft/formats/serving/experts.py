"""A copy of a LoRA of experts in one parameter, as in transformers 5, with a module per expert, as in transformers 4.

Servers and older programs know experts so. Gate and up, which are one matrix in the parameter, both take its whole A.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import regex
from torch import Tensor

from lightning_peft.errors import PEFTError
from lightning_peft.formats.counterpart import PREFIX
from lightning_peft.formats.counterparts.lora import rank_and_alpha

Layout = Literal["mixtral", "qwen"]

_NAMES = {
    "mixtral": ("block_sparse_moe", {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}),
    "qwen": ("mlp", {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}),
}
"""What is around the experts, and the layers that a parameter is made of."""
_A, _B = ".lora_A.weight", ".lora_B.weight"


def with_experts_divided(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], layout: Layout, source: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return configuration and tensors of the copy.

    Args:
        config: The adapter's configuration.
        tensors: Its tensors by name.
        layout: Whose names the layers are given: Mixtral's, or Qwen-MoE's, which most others have too.
        source: What to call it in errors.

    Raises:
        PEFTError: It is no plain LoRA, or adapts no experts in one parameter.
    """
    pairs = {
        name.removeprefix(PREFIX).removesuffix(_A): (a, tensors.get(f"{name.removesuffix(_A)}{_B}"))
        for name, a in tensors.items()
        if name.endswith(_A)
    }
    if config.get("peft_type") != "LORA" or not any(_experts(host) for host in pairs):
        raise PEFTError(f"{source} has no LoRA of experts in one parameter, which could be written a module each.")
    copied = {name: tensor for name, tensor in tensors.items() if not name.endswith((_A, _B))}
    ranks, alphas, targets = {}, {}, []
    for host, (a, b) in pairs.items():
        if b is None:
            raise PEFTError(f"{source}: {host!r} has A without B. It is damaged.")
        named, pattern, parts = _divided(host, a, b, config, layout, source)
        ranks[f"^{pattern}"], alphas[f"^{pattern}"] = rank_and_alpha(config, named, source)
        targets.append(pattern)
        for new, (of_a, of_b) in parts:
            copied[f"{PREFIX}{new}{_A}"], copied[f"{PREFIX}{new}{_B}"] = of_a.clone(), of_b.contiguous()
    patterns = {"rank_pattern": ranks, "alpha_pattern": alphas}
    return {**config, **patterns, "target_modules": "|".join(targets), "target_parameters": None}, copied


_Parts = Iterator[tuple[str, tuple[Tensor, Tensor]]]


def _divided(
    host: str, a: Tensor, b: Tensor, config: Mapping[str, Any], layout: Layout, source: str
) -> tuple[str, str, _Parts]:
    """Return the name of what a host's A and B change, a pattern that names it in the copy, and its parts there."""
    listed = [str(name) for name in config.get("target_parameters") or ()]
    around, layers = _NAMES[layout]
    if not (experts := _experts(host)):
        if not _is_listed(f"{host}.weight", listed):
            return host, regex.escape(host), iter([(host, (a, b))])
        # What chooses among experts: a linear layer in transformers 4, around which they are.
        new = f"{_outside(host)}.{around}.{host.rpartition('.')[2]}"
        return f"{host}.weight", regex.escape(new), iter([(new, (a, b))])
    present = [weight for weight in layers if _is_listed(f"{experts}.{weight}", listed)]
    # HF PEFT nests one wrapper a weight, the last weight's outermost.
    if not present or (host != experts and len(present) == 1):
        raise PEFTError(f"{source}: {host!r} is of a parameter that target_parameters={listed} does not name.")
    weight = present[0] if host != experts else present[-1]
    lead = f"{_outside(experts)}.{around}.experts"
    r = rank_and_alpha(config, f"{experts}.{weight}", source)[0]
    count, names = len(a) // r, layers[weight]
    if a.dim() != 2 or b.dim() != 2 or not len(a) == b.shape[1] == count * r or b.shape[0] % len(names):
        raise PEFTError(
            f"{source}: A and B of {host!r} have the shapes {list(a.shape)} and {list(b.shape)}; (experts · {r}, in) "
            f"and (out, {r} · experts) were expected. It is damaged."
        )
    return f"{experts}.{weight}", rf"{regex.escape(lead)}\.\d+\.(?:{'|'.join(names)})", _parts(lead, a, b, r, names)


def _parts(lead: str, a: Tensor, b: Tensor, r: int, names: Sequence[str]) -> _Parts:
    count = len(a) // r
    each = zip(a.view(count, r, -1), b.reshape(-1, r, count).permute(2, 0, 1), strict=True)
    for index, (of_a, of_b) in enumerate(each):
        for name, rows in zip(names, of_b.chunk(len(names)), strict=True):
            yield f"{lead}.{index}.{name}", (of_a, rows)


def _experts(host: str) -> str | None:
    """Return the module that holds experts, if a host in a file is that."""
    found = host.removesuffix(".base_layer")
    return found if found.endswith(".experts") else None


def _outside(name: str) -> str:
    return name.rpartition(".")[0].rpartition(".")[0]


def _is_listed(name: str, endings: Sequence[str]) -> bool:
    return any(f".{name}".endswith(f".{ending}") for ending in endings)
