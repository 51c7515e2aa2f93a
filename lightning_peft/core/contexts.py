"""A model otherwise for a while: as its base was, with adapters off; or as it is used, in evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lightning_peft.core.refusals import refuse_merged
from lightning_peft.core.registry import changed, required, trained_whole
from lightning_peft.core.stand_in import stand_in
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.tensors.sharding import assign, kept_by_zero, put_back, whole


@contextmanager
def disable(model: nn.Module) -> Iterator[None]:
    """Within it, the outputs of ``model`` are bit for bit the base model's, for the calling thread or task.

    Args:
        model: A model with adapters, not merged.

    Raises:
        PEFTError: There are no adapters, or they are merged. What is trained whole or has changed is written to the
            model for the while: another thread or task is within such a context, or calls the model.
    """
    view = ModelView(model)
    units = [module for _, module in view.walked]
    put_back(units)
    required(view)
    refuse_merged(view, "disable the adapters")
    others = [(tensor, old) for _, tensor, old in [*trained_whole(view), *changed(view)] if old is not None]
    if any(kept_by_zero(tensor) for tensor, _ in others):
        raise PEFTError(
            f"disable(model) on ZeRO-3, where {len(others)} tensors are trained whole or have changed: they cannot be "
            "what they were for a while, since ZeRO-3 gathers them ahead of the step that needs them. Train adapters "
            "alone (LoRA without train_also), or take stage 2 or another base."
        )
    with stand_in([(slot.stand_ins, None) for _, _, slot in view.slots], alone=bool(others)):
        kept = [whole(tensor).clone() for tensor, _ in others]
        try:
            for tensor, old in others:
                assign(tensor, old)
            yield
        finally:
            if others:
                # The outermost unit may be gathered, with the base's values, which the next call would compute with.
                put_back(units)
            for (tensor, _), value in zip(others, kept, strict=True):
                assign(tensor, value)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module and all below it in evaluation mode; afterwards each is as it was."""
    training = [child for child in module.modules() if child.training]
    module.eval()
    try:
        yield
    finally:
        for child in training:
            child.training = True
