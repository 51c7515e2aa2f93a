"""The base model for a while: adapters off, and what was trained whole as it was before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lightning_peft.core.adapter import base_tensors, slots, unwrap
from lightning_peft.core.refusals import refuse_merged
from lightning_peft.core.registry import required
from lightning_peft.core.sharding import replace, whole
from lightning_peft.core.stand_in import stand_in


@contextmanager
def disable(model: nn.Module) -> Iterator[None]:
    """Within it, the outputs of ``model`` are bit for bit the base model's.

    Args:
        model: A model with adapters, not merged.

    Raises:
        PEFTError: There are no adapters, or they are merged.
    """
    model = unwrap(model)
    found = required(model)
    refuse_merged(model, "disable the adapters")
    trained = [(base_tensors(root)[name], old) for _, root, reg in found for name, old in reg.whole.items()]
    kept = [whole(tensor).clone() for tensor, _ in trained]
    with stand_in([(slot, None) for _, _, slot in slots(model)]):
        try:
            for tensor, old in trained:
                replace(tensor, whole(old))
            yield
        finally:
            for (tensor, _), value in zip(trained, kept, strict=True):
                replace(tensor, value)
