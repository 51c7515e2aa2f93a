"""Tensors of which a process may hold only a piece: reading them whole, writing a whole value into the pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def whole(tensor: Tensor) -> Tensor:
    """Return the whole value of ``tensor``, without gradient. Every process that holds a piece has to call it."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of ``tensor``, sharing memory with it."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_slices(tensor: Tensor) -> tuple[slice, ...]:
    """Return where the part that this process holds lies in the whole."""
    shape, offset = tuple(tensor.shape), (0,) * tensor.dim()
    if isinstance(tensor, DTensor):
        shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def write(target: Tensor, value: Tensor) -> None:
    """Copy ``value``, a whole tensor that every process has, into ``target``."""
    with torch.no_grad():
        local_part(target).copy_(value[local_slices(target)])


def like(target: Tensor, value: Tensor) -> Tensor:
    """Return ``value``, a whole tensor that every process has, in pieces as ``target`` is."""
    if not isinstance(target, DTensor):
        return value
    pieces: Tensor = torch.empty_like(target, dtype=value.dtype)
    write(pieces, value)
    return pieces


def shard(value: Tensor, mesh: Any, placements: Any) -> Tensor:
    """Return ``value``, a whole tensor that every process has, in pieces over ``mesh``."""
    return distribute_tensor(value, mesh, placements, src_data_rank=None)


def map_tensors(content: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return ``content``, nested dicts and lists, with ``function`` applied to every tensor in it."""
    if isinstance(content, Tensor):
        return function(content)
    if isinstance(content, dict):
        return {key: map_tensors(value, function) for key, value in content.items()}
    if type(content) in (list, tuple):
        return type(content)(map_tensors(value, function) for value in content)
    return content
