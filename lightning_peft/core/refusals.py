"""States of a model in which something cannot be done."""

from __future__ import annotations

from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError


def refuse_merged(model: ModelView, action: str) -> None:
    """Raise :class:`PEFTError` if adapters are merged into the weights of ``model``."""
    if any(slot.merged is not None for _, _, slot in model.slots):
        raise PEFTError(f"Cannot {action}: the adapters are merged into the weights. Call unmerge(model) first.")


def refuse_stand_in(model: ModelView, action: str) -> None:
    """Raise :class:`PEFTError` if something else is in place of an active adapter of ``model``."""
    if any(slot.running is not slot.active_adapter for _, _, slot in model.slots):
        raise PEFTError(
            f"Cannot {action} inside of `with disable(model)` or `with adapter_names(model, …)`. Leave it first."
        )
