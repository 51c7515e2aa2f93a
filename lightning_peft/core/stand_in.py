"""Something else in place of the active adapters for a while."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lightning_peft.core.adapter import Adapter, Slot


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
