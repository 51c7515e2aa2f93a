"""How HF PEFT names LoRA's tensors of weights that a module reads itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from lightning_peft.adapters.low_rank.own_weights import attention_weights, key_of, own_weights
from lightning_peft.core.view import ModelView
from lightning_peft.targets.naming import suffixes

_OUT, _IN = "base_layer.out_proj.", ("q_proj_weight.", "k_proj_weight.", "v_proj_weight.")
# HF PEFT nests one wrapper a weight, the last weight's outermost. The longest ending comes first.
_LEADS = (_OUT, *_IN, *("base_layer." * depth for depth in reversed(range(8))))

ENDINGS: Mapping[str, str] = {f"{lead}lora_{letter}.weight": f"lora_{letter}" for lead in _LEADS for letter in "AB"}
"""Every ending of a tensor's name, with that of its name in the adapter."""


def tensors_of(module: nn.Module, weights: Iterable[str]) -> dict[str, str]:
    """Return what follows the module's name in the file, with the name of that parameter in the adapter.

    HF PEFT has no ``nn.MultiheadAttention`` with separate projections of the input: these names are our own.
    """
    weights = list(weights)
    if isinstance(module, nn.MultiheadAttention):
        leads = {"in_proj_weight": "", "out_proj.weight": _OUT, **{lead.removesuffix("."): lead for lead in _IN}}
    else:
        leads = {weight: "base_layer." * depth for depth, weight in enumerate(reversed(weights))}
    return {
        f"{leads[weight]}lora_{letter}.weight": f"factors.{key_of(weight)}.lora_{letter}"
        for weight in weights
        for letter in "AB"
    }


def weights_in(host: str, module: nn.Module, listed: Iterable[str]) -> dict[str, str]:
    """Return the weights of ``module`` that a file adapts, with the names of their targets.

    Args:
        host: The module's name.
        module: The module.
        listed: The file's ``target_parameters``.
    """
    if isinstance(module, nn.MultiheadAttention):
        return dict.fromkeys(attention_weights(module), host)
    names = {weight: f"{host}.{weight}".lstrip(".") for weight in own_weights(module)}
    return {w: name for w, name in names.items() if any(f".{name}".endswith(f".{ending}") for ending in listed)}


def parameter_targets(names: Iterable[str], root: ModelView) -> list[str]:
    """Return the shortest list of name endings that names exactly these parameters."""
    names = list(names)
    found = suffixes(names, [name for name, _ in root.parameters.items()]) if names else []
    return found or sorted(names)
