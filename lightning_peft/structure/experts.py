"""Mixtures of experts: the weights of experts that stand in one parameter, and what chooses among them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lightning_peft.core.view import ModelView, once
from lightning_peft.tensors.sharding import full_shape
from lightning_peft.tensors.weights import features, is_linear, is_script


@once
def expert_weights(model: ModelView) -> Mapping[str, nn.Module]:
    """Return the modules that hold experts, by the name of each 3-D parameter with a matrix for every expert.

    Such a module counts its experts in ``num_experts``, as transformers' and torchtitan's do.
    """
    return {
        f"{name}.{key}".lstrip("."): module
        for name, module in model.modules.items()
        if not is_script(module)
        for key, parameter in module._parameters.items()
        if parameter is not None and len(shape := full_shape(parameter)) == 3 and shape[0] == _count(module)
    }


@once
def router_names(model: ModelView) -> set[str]:
    """Return the names of the linear layers that choose among experts: a gate or a router beside them."""
    counts = {name.rpartition(".")[0]: _count(module) for name, module in expert_weights(model).items()}
    lists = {name: len(m) for name, m in model.modules.items() if isinstance(m, nn.ModuleList)}
    counts |= {name: count for name, count in lists.items() if name.rpartition(".")[2] == "experts"}
    found = set()
    for experts, count in counts.items():
        around = experts.rpartition(".")[0]
        for name, module in model.part(around).modules.items():
            chooses = any(word in name.partition(".")[0] for word in ("gate", "router"))
            if chooses and is_linear(module) and features(module)[1] == count:
                found.add(f"{around}.{name}".lstrip("."))
    return found


def _count(module: nn.Module) -> int | None:
    count = getattr(module, "num_experts", None)
    return count if isinstance(count, int) and count > 1 else None
