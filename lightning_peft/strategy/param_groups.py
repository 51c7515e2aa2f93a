"""Taking param groups out of an optimizer and splitting them, with the schedulers that follow them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_peft.core.adapter import clean_name
from lightning_peft.core.registry import method_of, registries
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError

# The lists in which torch's schedulers keep one entry per param group; first those of learning rates.
_LEARNING_RATES = ("base_lrs", "_last_lr", "max_lrs", "min_lrs")
_PER_GROUP = (*_LEARNING_RATES, "lr_lambdas", "base_momentums", "max_momentums")
# What schedulers and optimizers keep in a param group.
_GROUP_LEARNING_RATES = ("lr", "initial_lr", "max_lr", "min_lr")


def drop_groups(optimizer: Optimizer, schedulers: Iterable[Any], dropped: Sequence[int]) -> None:
    """Take the groups with the numbers ``dropped`` out, and their entries in schedulers."""
    if not dropped:
        return
    for _, values in _lists(optimizer, schedulers, len(optimizer.param_groups)):
        values[:] = [value for i, value in enumerate(values) if i not in dropped]
    optimizer.param_groups[:] = [group for i, group in enumerate(optimizer.param_groups) if i not in dropped]


def learning_rate_ratios(model: nn.Module) -> dict[int, float]:
    """Return what methods multiply learning rates by, by the parameter's id, where it is not 1."""
    found: dict[int, float] = {}
    view = ModelView(model)
    for prefix, _, registry in registries(view):
        for host, _, slot in view.part(prefix).slots:
            for adapter, module in slot.items():
                method = method_of(registry, adapter, host)
                found.update({id(p): method.lr_ratio(clean_name(name)) for name, p in module.named_parameters()})
    return {parameter: ratio for parameter, ratio in found.items() if ratio != 1}


def split_groups(optimizer: Optimizer, schedulers: Iterable[Any], ratios: Mapping[int, float]) -> None:
    """Give parameters with a ratio groups of their own, behind the others."""
    for index, group in enumerate(list(optimizer.param_groups)):
        of_each = [ratios.get(id(p), 1.0) for p in group["params"]]
        first, *others = dict.fromkeys(of_each) or [1.0]
        listed: dict[str, list[Any]] = {key: list(group[key]) for key in ("params", "param_names") if key in group}
        if others and isinstance(optimizer, torch.optim.LBFGS):
            raise PEFTError("LBFGS has one learning rate for all parameters; the method asks for several. Use AdamW.")
        for ratio in others:
            chosen = {k: [e for e, r in zip(v, of_each, strict=True) if r == ratio] for k, v in listed.items()}
            optimizer.param_groups.append(_scaled({**group, **chosen}, ratio))
        for key, entries in listed.items():
            group[key][:] = [entry for entry, r in zip(entries, of_each, strict=True) if r == first]
        group.update(_scaled(group, first))
        count = len(optimizer.param_groups) - len(others)
        for key, values in _lists(optimizer, schedulers, count):
            scaled = key in _LEARNING_RATES
            values += [values[index] * ratio if scaled else values[index] for ratio in others]
            values[index] = values[index] * first if scaled else values[index]


def _scaled(group: dict[str, Any], ratio: float) -> dict[str, Any]:
    return {key: value * ratio if key in _GROUP_LEARNING_RATES else value for key, value in group.items()}


def _lists(optimizer: Optimizer, schedulers: Iterable[Any], count: int) -> Iterator[tuple[str, list[Any]]]:
    """Yield the lists of ``count`` entries, one per param group, that the schedulers of ``optimizer`` keep."""
    seen: set[int] = set()
    for scheduler in _flatten(schedulers):
        for key in _PER_GROUP if scheduler.optimizer is optimizer else ():
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
