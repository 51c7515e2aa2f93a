"""The base model for a while: adapters off, and what was trained whole as it was before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lightning_peft.core.refusals import refuse_merged
from lightning_peft.core.registry import required, trained_whole
from lightning_peft.core.sharding import replace, whole
from lightning_peft.core.stand_in import stand_in
from lightning_peft.core.view import ModelView


@contextmanager
def disable(model: nn.Module) -> Iterator[None]:
    """Within it, the outputs of ``model`` are bit for bit the base model's.

    Args:
        model: A model with adapters, not merged.

    Raises:
        PEFTError: There are no adapters, or they are merged.
    """
    view = ModelView(model)
    required(view)
    refuse_merged(view, "disable the adapters")
    trained = [(tensor, old) for _, tensor, old in trained_whole(view)]
    kept = [whole(tensor).clone() for tensor, _ in trained]
    with stand_in([(slot, None) for _, _, slot in view.slots]):
        try:
            for tensor, old in trained:
                replace(tensor, whole(old))
            yield
        finally:
            for (tensor, _), value in zip(trained, kept, strict=True):
                replace(tensor, value)
