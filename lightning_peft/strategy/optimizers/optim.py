"""Optimizers hold what is trained and nothing else; their state is saved by parameter name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer

from lightning_peft.core.adapter import CHILD, clean_name
from lightning_peft.core.registry import registries, trains_everything
from lightning_peft.core.schema import fits
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.storage.state import adapter_parameters_and_whole
from lightning_peft.strategy.optimizers.param_groups import (
    drop_groups,
    has_to_keep_groups,
    learning_rate_ratios,
    settle_state,
    split_groups,
)
from lightning_peft.tensors.sharding import like


def restrict_to_trainable(optimizers: Sequence[Optimizer], schedulers: Iterable[Any], model: nn.Module) -> None:
    """Take frozen parameters out of every param group and put forgotten adapter parameters in.

    A forgotten one joins the group that held a parameter of the module that it adapts. A group that is left empty goes,
    and with it its entry in every scheduler; under a scheduler that is not torch's it stays, empty. A group whose
    parameters have other learning rates by their method (:meth:`~lightning_peft.core.method.PEFTMethod.lr_ratio`) is
    split, and schedulers keep the ratio. The optimizers are changed in place, before their first step.

    Args:
        optimizers: What ``configure_optimizers`` returned.
        schedulers: The schedulers on them.
        model: The model with adapters; its trainable parameters are those with ``requires_grad``.

    Raises:
        PEFTError: An optimizer is left with nothing, an adapter has no optimizer, an optimizer keeps copies of its
            param groups, or a group would have to be split under a scheduler that would not know of it.
    """
    for optimizer in optimizers:
        if isinstance(optimizer, ZeroRedundancyOptimizer):
            raise PEFTError(
                "ZeroRedundancyOptimizer keeps its own shards of the param groups, which cannot be restricted to "
                "adapters. Use the optimizer that it wraps: adapter states are small."
            )
    view = ModelView(model)
    schedulers = list(schedulers)
    names = {id(p): clean_name(name) for name, p in model.named_parameters()}
    _add_forgotten(view, optimizers)
    ratios = learning_rate_ratios(view)
    for optimizer in optimizers:
        had = [names[id(p)] for group in optimizer.param_groups for p in group["params"] if id(p) in names]
        if not trains_everything(view):
            _drop_frozen(optimizer, names)
        settle_state(optimizer)
        empty = [i for i, group in enumerate(optimizer.param_groups) if not group["params"]]
        if had and len(empty) == len(optimizer.param_groups):
            raise PEFTError(
                f"{type(optimizer).__name__} from configure_optimizers is left with nothing to train: it holds "
                f"{len(had)} frozen parameters ({', '.join(had[:3])}, …) and none that an adapter belongs to. "
                + _what_to_train(optimizer, optimizers)
            )
        if not has_to_keep_groups(optimizer, schedulers):
            drop_groups(optimizer, schedulers, empty)
        split_groups(optimizer, schedulers, ratios)


def _what_to_train(idle: Optimizer, optimizers: Iterable[Optimizer]) -> str:
    """Return what to do about an optimizer that is left with nothing."""
    for other in optimizers:
        if other is not idle and any(p.requires_grad for p in held_parameters([other])):
            return (
                f"The adapters belong to parameters that {type(other).__name__} holds. Leave this one out, or train "
                "something of its own: biases, PEFTStrategy([LoRA(...), BitFit()]), or modules, by train_also."
            )
    return "Give it self.parameters(), or name modules in target_modules or train_also."


def held_parameters(optimizers: Iterable[Optimizer]) -> list[nn.Parameter]:
    """Return the parameters that ``optimizers`` hold."""
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]


def state_by_name(optimizer: Optimizer, state: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return ``state``, the optimizer's ``state_dict()``, with parameter names in place of positions.

    A parameter without state (before the first step, or never used) has an empty one, so that a state which got lost
    can be told from one which never was. What is no parameter's, under a key of the optimizer's own, keeps its key. An
    optimizer without param groups in its state (one that wraps another, or
    what Lightning has in place of none) is saved as it is.
    """
    if "param_groups" not in state:
        return dict(state)
    names = parameter_names(optimizer, model)
    return {
        **state,
        "state": {
            **{key: entry for key, entry in state["state"].items() if key not in range(len(names))},
            **{name: state["state"].get(position, {}) for position, name in enumerate(names)},
        },
        "param_groups": [
            {**group, "params": [names[position] for position in group["params"]]} for group in state["param_groups"]
        ],
    }


def state_by_position(optimizer: Optimizer, saved: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return ``saved``, from :func:`state_by_name`, with this optimizer's positions in place of names.

    The order of parameters within a group may have changed.

    Raises:
        PEFTError: The groups hold other parameters than they did, or there is no state to go on from.
    """
    if "param_groups" not in saved:
        return dict(saved)
    _check_form(saved, type(optimizer).__name__)
    names = parameter_names(optimizer, model)
    groups, start = [], 0
    if len(saved["param_groups"]) != len(optimizer.param_groups):
        raise PEFTError(
            f"The checkpoint has {len(saved['param_groups'])} param groups, configure_optimizers made "
            f"{len(optimizer.param_groups)} with something to train. Make the groups that it was saved with."
        )
    for number, (group, old) in enumerate(zip(optimizer.param_groups, saved["param_groups"], strict=True)):
        positions = range(start, start + len(group["params"]))
        start += len(group["params"])
        now, then = {names[position] for position in positions}, set(old["params"])
        if now != then:
            raise PEFTError(
                f"Param group {number} of {type(optimizer).__name__} holds other parameters than in the checkpoint: "
                f"{sorted(now - then)[:3]} are new and would start with zero moments, {sorted(then - now)[:3]} are "
                "gone. Make the groups that it was saved with."
            )
        entry = {**old, "params": list(positions)}
        if "param_names" in group:
            entry["param_names"] = list(group["param_names"])
        groups.append(entry)
    if lost := [name for name in names if name not in saved["state"]]:
        raise PEFTError(
            f"The checkpoint has no {type(optimizer).__name__} state for {len(lost)} parameters ({lost[0]}, …): their "
            "training would go on with zero moments. Resume from another checkpoint, or load the adapter with "
            "load_adapter and start anew."
        )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[Any, Any] = {key: entry for key, entry in saved["state"].items() if key not in names}
    state |= {
        position: {key: _placed_like(parameter, value) for key, value in saved["state"][name].items()}
        for position, (name, parameter) in enumerate(zip(names, parameters, strict=True))
        if saved["state"][name]
    }
    return {**saved, "state": state, "param_groups": groups}


def _check_form(saved: Mapping[str, Any], name: str) -> None:
    """Check that ``saved`` has the form of an optimizer's state.

    Raises:
        PEFTError: It has not.
    """
    groups, state = saved["param_groups"], saved.get("state")
    if (
        not (isinstance(groups, list) and isinstance(state, Mapping))
        or not all(isinstance(group, Mapping) and fits(group.get("params"), list[str]) for group in groups)
        or not all(isinstance(entry, Mapping) for key, entry in state.items() if isinstance(key, str))
    ):
        raise PEFTError(f"The checkpoint's state of {name} is damaged. Take another checkpoint.")


def _placed_like(parameter: nn.Parameter, value: Any) -> Any:
    """Return an optimizer state's entry, if it has one element per element of ``parameter``, in pieces as that is."""
    return like(parameter, value) if isinstance(value, torch.Tensor) and value.shape == parameter.shape else value


def _add_forgotten(model: ModelView, optimizers: Sequence[Optimizer]) -> None:
    """Put adapters, and what is trained whole on request, into the groups of what they stand beside.

    Parameters of the base that a method trains were there for ``configure_optimizers`` to take: those that it left out
    are not trained, as without this package.
    """
    homes = {id(p): group for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    left_out = []
    chosen = {f"{prefix}.{name}".lstrip(".") for prefix, _, found in registries(model) for name in found.chosen}
    for name, parameter in adapter_parameters_and_whole(model).items():
        if not isinstance(parameter, nn.Parameter) or not parameter.requires_grad or id(parameter) in homes:
            continue
        if name in chosen:
            left_out.append(name)
            continue
        group = _home(model, name, homes)
        group["params"].append(parameter)
        if "param_names" in group:
            group["param_names"].append(name)
    if left_out and not trains_everything(model):
        rank_zero_warn(
            f"{len(left_out)} parameters that the method trains are in no optimizer from configure_optimizers, so they "
            f"stay as they are: {', '.join(left_out[:5])}. To train them, give the optimizer self.parameters()."
        )


def _home(model: ModelView, name: str, homes: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """Return the group for the parameter ``name``: that of another parameter of the module it belongs to."""
    host = name.split(f".{CHILD}.")[0] if f".{CHILD}." in name else name.rpartition(".")[0]
    for owner, module in model.walked:
        if owner == host:
            for parameter in module.parameters():
                if id(parameter) in homes:
                    return homes[id(parameter)]
    raise PEFTError(
        f"{name!r} is trained, but no optimizer from configure_optimizers holds it or a parameter of {host!r}. Give "
        "the optimizer self.parameters(), or the adapters by requires_grad; or leave the module out, exclude_modules="
        f"[{host!r}]."
    )


def _drop_frozen(optimizer: Optimizer, names: Mapping[int, str]) -> None:
    """Take the frozen parameters of the model, which has those in ``names``, out of the param groups."""
    for group in optimizer.param_groups:
        kept = [p.requires_grad or id(p) not in names for p in group["params"]]
        for key in ("params", "param_names"):
            if key in group:
                # In place: LBFGS and others hold on to the list itself.
                group[key][:] = [entry for entry, keep in zip(group[key], kept, strict=True) if keep]


def parameter_names(optimizer: Optimizer, model: nn.Module) -> list[str]:
    """Return the name of every parameter of ``optimizer``, by position."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    held = {*map(id, parameters)}
    names = {id(p): clean_name(name) for name, p in model.named_parameters() if id(p) in held}
    return [names.get(id(p), f"not in the module: {position}") for position, p in enumerate(parameters)]
