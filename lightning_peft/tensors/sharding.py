"""Tensors of which a process may hold only a piece: reading them whole, writing a whole value into the pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

_SHAPE = "_peft_full_shape"


def whole(tensor: Tensor) -> Tensor:
    """Return the whole value of ``tensor``, without gradient. Every process that holds a piece has to call it."""
    if in_zero_pieces(tensor):
        with gathered([tensor]):
            return tensor.detach().clone()
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of ``tensor``, sharing memory with it."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def kept_part(parameter: Tensor) -> Tensor:
    """Return what this process holds of ``parameter`` when nothing is gathered, sharing memory with it.

    ZeRO-3 keeps a flat piece beside a parameter that is empty, or gathered for a while.
    """
    if not hasattr(parameter, "ds_tensor"):
        return local_part(parameter)
    # Small parameters stay gathered after a forward pass: a copy that would not follow the piece.
    parameter.partition()  # type: ignore[attr-defined]
    piece: Tensor = parameter.ds_tensor.detach()
    return piece


def from_kept_part(target: Tensor, part: Tensor) -> Tensor:
    """Return the tensor that is ``target`` but for what processes keep of it (:func:`kept_part`), which is ``part``.

    It is in pieces as ``target`` is; under ZeRO-3 it is whole, and every process has to call this.
    """
    if hasattr(target, "ds_tensor"):
        of_zero: Any = target
        parts = [torch.empty_like(of_zero.ds_tensor) for _ in range(dist.get_world_size(of_zero.ds_process_group))]
        dist.all_gather(parts, part.to(of_zero.ds_tensor), group=of_zero.ds_process_group)
        return torch.cat(parts)[: of_zero.ds_numel].view(full_shape(target))
    if not isinstance(target, DTensor):
        return part
    mesh, placements, stride = target.device_mesh, target.placements, target.stride()
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=target.shape, stride=stride)


def zero_part(parameter: Tensor, value: Tensor) -> Tensor:
    """Return what this process keeps of ``value``, a whole tensor, if ZeRO-3 cuts it up as it has ``parameter``.

    All pieces are flat and of one size, the last ones filled up with zeros.
    """
    group, size = parameter.ds_process_group, parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
    padding = dist.get_world_size(group) * size - value.numel()
    return nn.functional.pad(value.flatten(), (0, padding)).narrow(0, dist.get_rank(group) * size, size)


def put_back(modules: Iterable[nn.Module]) -> None:
    """Have in shards again what FSDP2 has gathered for those of ``modules`` that are units of it."""
    for module in modules:
        if isinstance(module, FSDPModule):
            module.reshard()


def in_flat_pieces(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a parameter that ZeRO-3 or FSDP1 has cut up and not gathered."""
    return full_shape(tensor) != tensor.shape


def in_zero_pieces(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a parameter that ZeRO-3 has cut up and not gathered."""
    return hasattr(tensor, "ds_tensor") and in_flat_pieces(tensor)


def kept_by_zero(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a parameter that ZeRO-3 has cut up, gathered or not."""
    return hasattr(tensor, "ds_tensor")


def full_shape(tensor: Tensor) -> torch.Size:
    """Return the shape of the whole; a parameter in flat pieces has another ``shape``."""
    shape: torch.Size = getattr(tensor, "ds_shape", getattr(tensor, _SHAPE, tensor.shape))
    return shape


def keep_shape(parameter: Tensor, shape: torch.Size) -> None:
    """Keep the shape of the whole with ``parameter``, which FSDP1 has cut up."""
    setattr(parameter, _SHAPE, shape)


def gathered(parameters: Iterable[Tensor]) -> AbstractContextManager[Any]:
    """Return a context in which ``parameters`` that ZeRO-3 has cut up are whole; at its end rank 0's values count."""
    parameters = [parameter for parameter in parameters if hasattr(parameter, "ds_tensor")]
    if not parameters:
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)
    return context


def by_kind(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Return ``tensors`` in lists that torch's kernels for many tensors take: whole ones, or in pieces on one mesh."""
    kinds: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault(tensor.device_mesh if isinstance(tensor, DTensor) else None, []).append(tensor)
    return list(kinds.values())


def local_slices(tensor: Tensor) -> tuple[slice, ...]:
    """Return where the part that this process holds lies in the whole."""
    shape, offset = tuple(tensor.shape), (0,) * tensor.dim()
    if isinstance(tensor, DTensor):
        shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def write(target: Tensor, value: Tensor) -> None:
    """Copy ``value``, a whole tensor that every process has, into ``target``."""
    # What detach() returns shares no places with a sparse tensor.
    own = local_part(target) if target.layout is torch.strided else target
    with torch.no_grad():
        own.copy_(value[local_slices(target)] if isinstance(target, DTensor) else value)


def replace(target: Tensor, value: Tensor) -> None:
    """Copy ``value``, as :func:`write` does, into a ``target`` that ZeRO-3 may have cut up."""
    if not hasattr(target, "ds_tensor"):
        return write(target, value)
    with gathered([target]), torch.no_grad():
        target.copy_(value)


def assign(target: Tensor, value: Tensor) -> None:
    """Copy ``value``, as :func:`replace` does, into a ``target`` that may have had another shape."""
    if full_shape(target) == full_shape(value):
        replace(target, whole(value))
    else:
        target.data = value.to(target, copy=True)


def host_copy(tensor: Tensor) -> Tensor:
    """Return a copy in host memory; of what is in pieces, or has no memory, one that is like it."""
    tensor = tensor.detach()
    return tensor.clone() if tensor.is_meta or isinstance(tensor, DTensor) else tensor.to("cpu", copy=True)


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


def alongside(x: Tensor, value: Tensor) -> Tensor:
    """Return ``value``, which every process has, as what can be computed with ``x``, an activation maybe in pieces."""
    return DTensor.from_local(value, x.device_mesh, run_check=False) if isinstance(x, DTensor) else value


def in_one_piece(x: Tensor) -> Tensor:
    """Return an activation whole that layers split by tensor parallelism may hand on in pieces, within its graph."""
    return x.redistribute(placements=[Replicate()] * x.device_mesh.ndim) if isinstance(x, DTensor) else x


def map_tensors(content: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return ``content``, nested dicts and lists, with ``function`` applied to every tensor in it."""
    if isinstance(content, Tensor):
        return function(content)
    if isinstance(content, dict):
        return {key: map_tensors(value, function) for key, value in content.items()}
    if type(content) in (list, tuple):
        return type(content)(map_tensors(value, function) for value in content)
    return content
