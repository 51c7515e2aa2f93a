"""What ``all-linear``, ``attention`` and ``mlp`` mean in a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import nn

from lightning_peft.core.view import ModelView
from lightning_peft.structure.attention import attention_roots, mlp_beside, recurrent_roots, refuse_mixed, surrounding
from lightning_peft.structure.inner_models import head_modules
from lightning_peft.structure.layers import listed_blocks
from lightning_peft.structure.plain import is_own_linear
from lightning_peft.targets.patterns import ALL_LINEAR
from lightning_peft.tensors.weights import is_linear


def in_preset(model: ModelView, preset: str) -> set[str]:
    """Return the names of the linear layers, whoever made them, and ``nn.MultiheadAttention`` that ``preset`` means.

    Raises:
        PEFTError: Attention and MLP cannot be told apart.
    """
    heads, uncalled = head_modules(model), uncalled_modules(model)
    linears = {
        name
        for name, module in model.modules.items()
        if isinstance(module, nn.MultiheadAttention)
        or (id(module) not in heads and name not in uncalled and (is_linear(module) or is_own_linear(module)))
    }
    if preset == ALL_LINEAR:
        return linears
    refuse_mixed(model)
    attention = _inside(linears, attention_roots(model)) - mlp_beside(model).keys()
    if preset == "attention":
        return attention
    return (linears & listed_blocks(model).keys()) - attention - _inside(linears, recurrent_roots(model))


def uncalled_modules(model: ModelView) -> set[str]:
    """Names of modules whose parent reads their weight instead of calling them: no hook of theirs ever runs."""
    attentions = [module for module in model.modules.values() if isinstance(module, nn.MultiheadAttention)]
    uncalled = {id(attention.out_proj) for attention in attentions}
    return {name for name, module in model.modules.items() if id(module) in uncalled}


def nothing_in_preset(model: ModelView, preset: str, candidates: Mapping[str, nn.Module]) -> str:
    """Return the message for a preset that means nothing in ``model``.

    Args:
        model: The model.
        preset: The preset.
        candidates: What can be adapted in it.
    """
    what = "linear layer" if preset == ALL_LINEAR else f"{preset} block"
    kinds = Counter(type(module).__name__ for module in candidates.values())
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    names = ", ".join(map(repr, list(candidates)[:3]))
    by_name = f" It has {counts}, which are adapted by name: target_modules=[{names}]." if counts else ""
    return f"target_modules: {preset!r} finds no {what} in this {model.kind}.{by_name}"


def _inside(names: set[str], roots: Mapping[str, nn.Module]) -> set[str]:
    return {name for name in names if any(around in roots for around in surrounding(name))}
