"""Noticing that frozen weights were written to: by an average, a callback that prunes, or a loop of its own."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_peft.core.registry import trained_whole
from lightning_peft.core.view import ModelView, seen_parameters
from lightning_peft.tensors.sharding import local_part


class FrozenWeights:
    """What the frozen weights of a model were when it was made: a sum over the bits of each, which takes no copy.

    It tells every change but one that only puts a tensor's elements into another order, whichever way it was made
    (``tensor.data`` has no version counter), and reads each weight once, at the speed of memory.

    Args:
        model: A model with adapters whose weights are not in pieces, or in pieces that are DTensors.
    """

    def __init__(self, model: ModelView) -> None:
        self._names = frozenset(seen_parameters(model))
        self._sums = _sums(model)

    def changed(self, model: ModelView) -> set[str]:
        """Return the names of frozen weights of ``model`` that have changed since, or are new."""
        # One that another was put in the place of is there by a further name.
        tied = {n: p for n in self._names - seen_parameters(model).keys() if (p := model.parameter(n)) is not None}
        now = _sums(model, tied)
        return {name for name, value in now.items() if value != self._sums.get(name, value) or name not in self._names}


def _sums(model: ModelView, more: Mapping[str, Tensor] = MappingProxyType({})) -> dict[str, int]:
    trained = {name for name, _, _ in trained_whole(model)}
    found: dict[torch.device, dict[str, Tensor]] = {}
    for name, weight in {**seen_parameters(model), **more}.items():
        if name not in trained and _is_readable(weight):
            found.setdefault(weight.device, {})[name] = _sum(weight)
    # One transfer for each device, not one for each weight.
    values = [(sums, torch.stack(list(sums.values())).tolist()) for sums in found.values()]
    return {name: value for sums, listed in values for name, value in zip(sums, listed, strict=True)}


def _sum(weight: Tensor) -> Tensor:
    """Return the sum over the bits of ``weight``, eight bytes at a time."""
    # A slice with steps, an expanded or a conjugate tensor has no bits in a row of its own: those are copied.
    flat = local_part(weight).resolve_conj().resolve_neg().reshape(-1).contiguous()
    if flat.storage_offset() * flat.itemsize % 8:
        flat = flat.clone()
    if flat.numel() * flat.itemsize % 8 == 0:
        return flat.view(torch.int64).sum()
    data = flat.view(torch.uint8)
    whole = data.numel() // 8 * 8
    found = data[:whole].view(torch.int64).sum()
    return found if whole == data.numel() else found + data[whole:].sum()


def _is_readable(weight: Tensor) -> bool:
    """Whether this process has bits of ``weight`` in plain memory."""
    packed = hasattr(weight, "__tensor_flatten__") and not isinstance(weight, DTensor)
    return not (weight.is_meta or hasattr(weight, "ds_tensor") or packed)
