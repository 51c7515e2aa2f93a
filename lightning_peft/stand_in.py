"""Something else in place of the active adapters for a while."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from lightning_peft.adapter import Adapter, Slot, slots, unwrap
from lightning_peft.errors import PEFTError


@contextmanager
def stand_in(adapters: Sequence[tuple[Slot, Adapter | None]]) -> Iterator[None]:
    """Within it, the host of each slot calls the adapter beside it, or none."""
    before = [(slot, slot.running) for slot, _ in adapters]
    try:
        for slot, adapter in adapters:
            slot.run(adapter)
        yield
    finally:
        for slot, adapter in before:
            slot.run(adapter)


def refuse_stand_in(model: nn.Module, action: str) -> None:
    """Raise :class:`PEFTError` if something else is in place of an active adapter of ``model``."""
    if any(slot.running is not slot.active_adapter for _, _, slot in slots(unwrap(model))):
        raise PEFTError(
            f"Cannot {action} inside of `with disable(model)` or `with adapter_names(model, …)`. Leave it first."
        )
