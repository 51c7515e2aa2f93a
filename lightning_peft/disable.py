"""The base model for a while: adapters off, and what was trained whole as it was before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lightning_peft.adapter import base_tensors, slots, unwrap
from lightning_peft.inject import refuse_merged
from lightning_peft.registry import required


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
    active = [(slot, slot.active) for _, _, slot in slots(model)]
    trained = [(base_tensors(root)[name], old) for _, root, reg in found for name, old in reg.whole.items()]
    kept = [tensor.detach().clone() for tensor, _ in trained]
    try:
        for slot, _ in active:
            slot.active = ""
        _write([tensor for tensor, _ in trained], [old for _, old in trained])
        yield
    finally:
        for slot, name in active:
            slot.active = name
        _write([tensor for tensor, _ in trained], kept)


@torch.no_grad()
def _write(tensors: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
