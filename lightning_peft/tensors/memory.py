"""Which tensors have memory in common: writing to one of them changes the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from lightning_peft.tensors.sharding import local_part


def overlapping(tensors: Iterable[Tensor]) -> set[int]:
    """Return the ids of those of ``tensors``, each given once, whose memory overlaps another's in this process."""
    found: set[int] = set()
    furthest = ("", 0, 0)  # device, end and id of what reaches furthest so far
    for device, start, end, key in sorted(_spans(tensors)):
        if device == furthest[0] and start < furthest[1]:
            found |= {key, furthest[2]}
        if device != furthest[0] or end > furthest[1]:
            furthest = (device, end, key)
    return found


def _spans(tensors: Iterable[Tensor]) -> Iterator[tuple[str, int, int, int]]:
    """Yield device, first address, end and id of each tensor that has an address."""
    for tensor in tensors:
        part = local_part(tensor)
        # Tensor classes of a quantiser's own hold several tensors, and no address.
        if part.is_meta or part.layout != torch.strided or hasattr(part, "__tensor_flatten__") or not part.numel():
            continue
        reach = sum((size - 1) * stride for size, stride in zip(part.shape, part.stride(), strict=True)) + 1
        start = part.data_ptr()
        yield str(part.device), start, start + reach * part.element_size(), id(tensor)


def is_expanded(tensor: Tensor | None) -> bool:
    """Whether several elements of ``tensor`` lie in one place, as ``expand`` puts them."""
    if tensor is None or tensor.layout is not torch.strided or type(tensor) not in (Tensor, nn.Parameter):
        return False
    return any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))
