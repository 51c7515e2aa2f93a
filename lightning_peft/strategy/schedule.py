"""Schedules of methods: what they do to adapters before and after each optimizer step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from lightning_peft.core.adapter import Adapter
from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.registry import registries
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError


def has_schedule(methods: Sequence[PEFTMethod]) -> bool:
    """Whether one of ``methods`` does something before or after each step."""
    return changes_gradients(methods) or any(type(m).after_step is not PEFTMethod.after_step for m in methods)


def changes_gradients(methods: Sequence[PEFTMethod]) -> bool:
    """Whether one of ``methods`` does something before each step."""
    return any(type(method).before_step is not PEFTMethod.before_step for method in methods)


def known_steps(methods: Sequence[PEFTMethod], count: float) -> int | None:
    """Return the number of optimizer steps of a run, ``count``, or ``None`` if that is infinite.

    Raises:
        PEFTError: It is infinite, and a method cannot do without it.
    """
    if math.isfinite(count):
        return int(count)
    for method in methods:
        if method.needs_total_steps:
            raise PEFTError(
                f"{type(method).__name__} divides the run's optimizer steps among its phases, but their number is not "
                "known: the Trainer has neither max_steps nor max_epochs, or the data no length. Set max_steps."
            )
    return None


@torch.no_grad()
def before_step(model: nn.Module, scale: float) -> None:
    """Let the methods of the active adapters of ``model`` add to gradients, which are multiplied by ``scale``."""
    for method, adapters in _active(model):
        method.before_step(adapters, scale)


@torch.no_grad()
def after_step(model: nn.Module, step: int, total_steps: int | None) -> None:
    """Let the methods of the active adapters of ``model`` do what they do after optimizer step ``step``."""
    for method, adapters in _active(model):
        method.after_step(adapters, step, total_steps)


def _active(model: nn.Module) -> Iterator[tuple[PEFTMethod, dict[str, Adapter]]]:
    """Yield the methods of the active adapters of ``model``, each with its adapters by the name of their host."""
    view = ModelView(model)
    for prefix, _, registry in registries(view):
        for position, method in enumerate(registry.methods[registry.active]):
            adapters: dict[str, Adapter] = {}
            for host, _, slot in view.part(prefix).slots:
                adapter = slot.active_adapter
                if adapter is not None and registry.hosts[slot.active][host] == position:
                    adapters[host] = adapter
            yield method, adapters
