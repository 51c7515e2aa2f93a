"""Taking param groups out of an optimizer and splitting them, with the schedulers and the state that follow them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_peft.core.adapter import clean_name
from lightning_peft.core.registry import adapted, method_of
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError

# The lists in which torch's schedulers keep one entry per param group; first those of learning rates.
_LEARNING_RATES = ("base_lrs", "_last_lr", "max_lrs", "min_lrs")
_PER_GROUP = (*_LEARNING_RATES, "lr_lambdas", "base_momentums", "max_momentums")
# What schedulers and optimizers keep in a param group.
_GROUP_LEARNING_RATES = ("lr", "initial_lr", "max_lr", "min_lr")
_RATIO = "lr_ratio"
"""Under it a group keeps what its learning rates were multiplied by: a second run may be given the same optimizer."""


def has_to_keep_groups(optimizer: Optimizer, schedulers: Iterable[Any]) -> bool:
    """Whether a scheduler of ``optimizer`` may keep something for each of its groups in a way not known here."""
    found = list(_flatten(schedulers))
    return _is_hidden(optimizer, found) or any(not type(s).__module__.startswith("torch.optim.") for s in found)


def drop_groups(optimizer: Optimizer, schedulers: Iterable[Any], dropped: Sequence[int]) -> None:
    """Take the groups with the numbers ``dropped`` out, and their entries in schedulers."""
    if not dropped:
        return
    for _, values in _lists(optimizer, schedulers, len(optimizer.param_groups)):
        values[:] = [value for i, value in enumerate(values) if i not in dropped]
    optimizer.param_groups[:] = [group for i, group in enumerate(optimizer.param_groups) if i not in dropped]


def settle_state(optimizer: Optimizer) -> None:
    """Give new parameters the state with which ``optimizer`` starts, and forget that of parameters it no longer holds.

    Most optimizers make a parameter's state in its first step, Adagrad when it is made itself. What it made for one
    parameter tells what it makes for another.

    Raises:
        PEFTError: It does not: the state differs from element to element.
    """
    held = {p for group in optimizer.param_groups for p in group["params"]}
    start = next(((p, state) for p, state in optimizer.state.items() if isinstance(p, Tensor) and _is_new(state)), None)
    if start is not None:
        for parameter in held - optimizer.state.keys():
            optimizer.state[parameter] = {k: _for(parameter, start[0], v, optimizer) for k, v in start[1].items()}
    for key in [key for key in optimizer.state if isinstance(key, Tensor) and key not in held]:
        del optimizer.state[key]


def _is_new(state: Mapping[str, Any]) -> bool:
    """Whether ``state`` is that of a parameter before its first step: of an optimizer that counts them."""
    return "step" in state and float(state["step"]) == 0


def _for(parameter: Tensor, other: Tensor, value: Any, optimizer: Optimizer) -> Any:
    """Return the entry ``value`` of the state with which ``other`` starts, as it is for ``parameter``."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return deepcopy(value)
    if value.shape != other.shape or (value != value.flatten()[:1]).any():
        raise PEFTError(
            f"{type(optimizer).__name__} keeps state of its parameters from the start, which differs from element to "
            "element: it cannot be made for adapters. Make the optimizer in configure_optimizers."
        )
    return torch.full_like(parameter, value.flatten()[0].item(), dtype=value.dtype)


def learning_rate_ratios(model: ModelView) -> dict[int, float]:
    """Return what methods multiply learning rates by, by the parameter's id, where it is not 1."""
    found: dict[int, float] = {}
    for prefix, _, registry in adapted(model):
        for host, _, slot in model.part(prefix).slots:
            for adapter, module in slot.items():
                if host not in registry.hosts.get(adapter, ()):
                    continue  # it was injected into a part, which has a registry of its own
                method = method_of(registry, adapter, host)
                found.update({id(p): method.lr_ratio(clean_name(name)) for name, p in module.named_parameters()})
    return {parameter: ratio for parameter, ratio in found.items() if ratio != 1}


def split_groups(optimizer: Optimizer, schedulers: Sequence[Any], ratios: Mapping[int, float]) -> None:
    """Give parameters with a ratio groups of their own, behind the others.

    Raises:
        PEFTError: The optimizer has one learning rate for all, or a scheduler would not know of the new groups.
    """
    for index, group in enumerate(list(optimizer.param_groups)):
        of_each = [ratios.get(id(p), 1.0) / group.get(_RATIO, 1.0) for p in group["params"]]
        first, *others = dict.fromkeys(of_each) or [1.0]
        listed: dict[str, list[Any]] = {key: list(group[key]) for key in ("params", "param_names") if key in group}
        if others and isinstance(optimizer, torch.optim.LBFGS):
            raise PEFTError("LBFGS has one learning rate for all parameters; the method asks for several. Use AdamW.")
        if others or first != 1:
            _refuse_ratio(optimizer, schedulers)
        for ratio in others:
            chosen = {k: [e for e, r in zip(v, of_each, strict=True) if r == ratio] for k, v in listed.items()}
            # Groups that are named have each a name of its own; LearningRateMonitor insists on it.
            named = {"name": f"{group['name']}_x{ratio:g}"} if "name" in group else {}
            optimizer.param_groups.append(_scaled({**group, **chosen, **named}, ratio))
        for key, entries in listed.items():
            group[key][:] = [entry for entry, r in zip(entries, of_each, strict=True) if r == first]
        group.update(_scaled(group, first))
        count = len(optimizer.param_groups) - len(others)
        for key, values in _lists(optimizer, schedulers, count):
            scaled = key in _LEARNING_RATES
            values += [values[index] * ratio if scaled else values[index] for ratio in others]
            values[index] = values[index] * first if scaled else values[index]


def _refuse_ratio(optimizer: Optimizer, schedulers: Iterable[Any]) -> None:
    """Check that every scheduler of ``optimizer`` can be told of groups that are new, or have another learning rate."""
    found = list(_flatten(schedulers))
    # What derives from torch's keeps what that does, and fails in its first step if it has to keep more.
    unknown = [type(scheduler).__name__ for scheduler in found if not isinstance(scheduler, LRScheduler)]
    if _is_hidden(optimizer, found):
        unknown.append("a scheduler that configure_optimizers does not return")
    if unknown:
        raise PEFTError(
            f"The method multiplies the learning rates of some parameters, which get param groups of their own, but "
            f"{unknown[0]} sets learning rates too and would not know. Return a scheduler of torch's from "
            "configure_optimizers, or leave the ratio out of the method and make the groups there."
        )


def has_lost_ratios(optimizer: Optimizer) -> bool:
    """Whether somebody has set one learning rate for groups of which a method multiplies some."""
    ratios = {group.get(_RATIO, 1.0) for group in optimizer.param_groups}
    rates = {float(group.get("lr", 0.0)) for group in optimizer.param_groups}
    return len(ratios) > 1 and len(rates) == 1 and 0.0 not in rates


def _is_hidden(optimizer: Optimizer, schedulers: Sequence[Any]) -> bool:
    """Whether a scheduler was made for ``optimizer`` that is not among ``schedulers``: all leave a mark in groups."""
    marked = any("initial_lr" in group for group in optimizer.param_groups)
    return marked and all(getattr(scheduler, "optimizer", None) is not optimizer for scheduler in schedulers)


def _scaled(group: dict[str, Any], ratio: float) -> dict[str, Any]:
    if ratio == 1:
        return group
    scaled = {key: value * ratio if key in _GROUP_LEARNING_RATES else value for key, value in group.items()}
    return {**scaled, _RATIO: group.get(_RATIO, 1.0) * ratio}


def _lists(optimizer: Optimizer, schedulers: Iterable[Any], count: int) -> Iterator[tuple[str, list[Any]]]:
    """Yield the lists of ``count`` entries, one per param group, that the schedulers of ``optimizer`` keep."""
    seen: set[int] = set()
    for scheduler in _flatten(schedulers):
        for key in _PER_GROUP if getattr(scheduler, "optimizer", None) is optimizer else ():
            values = getattr(scheduler, key, None)
            # Two attributes may be one list.
            if isinstance(values, list) and len(values) == count and id(values) not in seen:
                seen.add(id(values))
                yield key, values


def _flatten(schedulers: Iterable[Any]) -> Iterator[Any]:
    """Yield schedulers and those inside ``SequentialLR`` and ``ChainedScheduler``."""
    for scheduler in schedulers:
        yield scheduler
        yield from _flatten(getattr(scheduler, "_schedulers", ()))
