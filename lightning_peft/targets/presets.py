"""What ``all-linear``, ``attention`` and ``mlp`` mean in a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Mapping
from typing import Any

from torch import nn

from lightning_peft.core.view import ModelView
from lightning_peft.structure.attention import attention_roots, mlp_beside, recurrent_roots, refuse_mixed, surrounding
from lightning_peft.structure.experts import expert_weights, router_names
from lightning_peft.structure.inner_models import head_modules
from lightning_peft.structure.layers import listed_blocks
from lightning_peft.structure.plain import is_own_linear
from lightning_peft.targets.patterns import ALL_LINEAR, matches, patterns_for
from lightning_peft.tensors.weights import is_conv, is_linear


def in_preset(model: ModelView, preset: str) -> set[str]:
    """Return the names of the linear layers, whoever made them, and ``nn.MultiheadAttention`` that ``preset`` means.

    Experts that stand in one parameter are among them by that parameter's name; what chooses among experts is not.

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
    linears -= router_names(model)
    experts = expert_weights(model)
    if preset == ALL_LINEAR:
        return linears | experts.keys()
    refuse_mixed(model)
    attention = _inside(linears, attention_roots(model)) - mlp_beside(model).keys()
    if preset == "attention":
        return attention
    listed = listed_blocks(model)
    dense = (linears & listed.keys()) - attention - _inside(linears, recurrent_roots(model))
    return dense | {name for name in experts if name.rpartition(".")[0] in listed}


def uncalled_modules(model: ModelView) -> set[str]:
    """Names of modules whose parent reads their weight instead of calling them: no hook of theirs ever runs."""
    attentions = [module for module in model.modules.values() if isinstance(module, nn.MultiheadAttention)]
    uncalled = {id(attention.out_proj) for attention in attentions}
    return {name for name, module in model.modules.items() if id(module) in uncalled}


def nothing_in_preset(
    model: ModelView,
    preset: str,
    candidates: Mapping[str, nn.Module],
    refused: Container[str],
    written: Callable[[dict[str, Any], Mapping[str, nn.Module]], str] | None,
) -> str:
    """Return the message for a preset that means nothing in ``model``.

    Args:
        model: The model.
        preset: The preset.
        candidates: What can be adapted in it by name.
        refused: What of that cannot.
        written: Gives what a user is to write, for ``target_modules`` and ``exclude_modules``, and the modules meant.
    """
    what = "linear layer" if preset == ALL_LINEAR else f"{preset} block"
    nothing = f"target_modules: {preset!r} finds no {what} in this {model.kind}."
    counts = ", ".join(
        f"{count} {kind}" for kind, count in Counter(type(m).__name__ for m in candidates.values()).items()
    )
    convolutions = {name: module for name, module in candidates.items() if is_conv(module)}
    meant = convolutions if convolutions and preset == ALL_LINEAR else candidates
    possible = {name: module for name, module in meant.items() if name not in refused}
    if not possible or written is None:
        return nothing
    patterns = patterns_for(possible, candidates.keys() - meant.keys())
    exclude = [n for n in meant if n not in possible and any(matches(pattern, n) for pattern in patterns)]
    given = {"target_modules": patterns, **({"exclude_modules": exclude} if exclude else {})}
    return f"{nothing} It has {counts}, which are adapted by name: {written(given, possible)}."


def _inside(names: set[str], roots: Mapping[str, nn.Module]) -> set[str]:
    return {name for name in names if any(around in roots for around in surrounding(name))}
