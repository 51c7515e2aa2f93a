"""Schedules of methods: what they do to adapters before and after each optimizer step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from lightning_peft.core.adapter import Adapter
from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.registry import adapted
from lightning_peft.errors import PEFTError
from lightning_peft.operations.shards import resharded


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
    """Let the methods of adapters that took part in the step add to gradients, which are multiplied by ``scale``."""
    for method, adapters in _taking_part(model):
        method.before_step(adapters, scale)


@torch.no_grad()
def after_step(model: nn.Module, step: int, total_steps: int | None) -> None:
    """Let the methods of adapters that took part do what they do after optimizer step ``step``."""
    for method, adapters in _taking_part(model):
        method.after_step(adapters, step, total_steps)


def _taking_part(model: nn.Module) -> Iterator[tuple[PEFTMethod, dict[str, Adapter]]]:
    """Yield the methods of the active adapter, and of others that got gradients, with its parts by name of the host."""
    view = resharded(model)
    for prefix, _, registry in adapted(view):
        slots = view.part(prefix).slots
        for name, methods in registry.methods.items():
            found = {host: part for host, _, slot in slots if isinstance(part := slot._modules.get(name), Adapter)}
            # Those of frozen copies are frozen too.
            parts = {host: part for host, part in found.items() if any(p.requires_grad for p in part.parameters())}
            if name == registry.active or any(p.grad is not None for part in parts.values() for p in part.parameters()):
                for position, method in enumerate(methods):
                    yield method, {h: part for h, part in parts.items() if registry.hosts[name].get(h) == position}
