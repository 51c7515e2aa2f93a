"""Adapters beside layers that tensor parallelism has split: they are split as the layer is, or refused."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from lightning_peft.core.adapter import Adapter
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.tensors.sharding import shard
from lightning_peft.tensors.weights import is_transposed

TENSOR = "tensor_parallel"
"""What Lightning calls that dimension of its mesh of devices."""


def split_adapters(model: ModelView, mesh: DeviceMesh) -> None:
    """Split every adapter beside a split layer along the features along which that is split; all else is replicated.

    Raises:
        PEFTError: One cannot be; none has been split.
    """
    found = [(name, host, adapter) for name, host, slot in model.slots for adapter in slot.values()]
    split = {id(adapter) for _, host, adapter in found if is_split(host._parameters.get("weight"))}
    # What several adapters share, and what one reads of another's layer: a part of both.
    parts = [{id(p) for _, _, a in found if (id(a) in split) == side for p in a.modules()} for side in (True, False)]
    for name, host, adapter in found:
        assert isinstance(adapter, Adapter)
        _refuse_heads(name, host, adapter)
        if id(adapter) in split:
            _refuse_unsaid(name, adapter)
        if any(id(part) in parts[0] & parts[1] for part in adapter.modules()):
            raise PEFTError(
                f"{type(adapter).__name__} of {name!r} has something in common with an adapter of another layer, and "
                "tensor parallelism has split one of the two layers alone. Split both, adapt one of them, or shard "
                "with fully_shard alone."
            )
    for _, host, adapter in found:
        if id(adapter) in split:
            assert isinstance(adapter, Adapter)
            _split(adapter, _axis(host), mesh)


def is_split(tensor: Tensor | None) -> bool:
    """Whether tensor parallelism has split ``tensor``."""
    return isinstance(tensor, DTensor) and TENSOR in (tensor.device_mesh.mesh_dim_names or ())


def _refuse_heads(name: str, host: nn.Module, adapter: Adapter) -> None:
    if adapter.of_heads and any(map(is_split, host.parameters())):
        raise PEFTError(
            f"Tensor parallelism has split {name!r}, so that each process has some of its heads. What "
            f"{type(adapter).__name__} adds is for all of them. Use LoRA or PromptTuning there, or shard with "
            "fully_shard alone."
        )


def _refuse_unsaid(name: str, adapter: Adapter) -> None:
    if missing := [key for key, _ in adapter.named_parameters() if key not in adapter.axes]:
        raise PEFTError(
            f"{type(adapter).__name__} does not say how {missing[0]!r} is split beside {name!r}, a layer that tensor "
            "parallelism has split. Use LoRA there, or shard with fully_shard alone."
        )


def _axis(host: nn.Module) -> str | None:
    """Return along which of its features the weight of ``host`` is split, if it is not replicated."""
    weight = host._parameters["weight"]
    assert isinstance(weight, DTensor)
    placement = weight.placements[(weight.device_mesh.mesh_dim_names or ()).index(TENSOR)]
    return ("in", "out")[(placement.dim == 0) != is_transposed(host)] if isinstance(placement, Shard) else None


def _split(adapter: Adapter, axis: str | None, mesh: DeviceMesh) -> None:
    for name, axes in adapter.axes.items():
        path, _, leaf = name.rpartition(".")
        owner = adapter.get_submodule(path)
        tensor = owner._parameters.get(leaf, owner._buffers.get(leaf))
        if tensor is None or isinstance(tensor, DTensor):  # one that this adapter lacks, or that others share with it
            continue
        pieces = shard(tensor.detach(), mesh, [Shard(axes.index(axis)) if axis in axes else Replicate()])
        if leaf in owner._buffers:
            owner._buffers[leaf] = pieces
        else:
            owner.register_parameter(leaf, nn.Parameter(pieces, requires_grad=tensor.requires_grad))
