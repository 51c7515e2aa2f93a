"""Base weights: which modules have one that an adapter can follow, its shape, reading and writing it."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.tensors.packed import is_packed_linear
from lightning_peft.tensors.sharding import full_shape, whole


def conv1d_class() -> type[nn.Module] | None:
    """Return transformers' ``Conv1D``: a linear layer whose weight is stored ``[in, out]``."""
    # An instance can only exist once its module is imported: no need to import transformers for plain torch users.
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' ``Conv1D``."""
    kind = conv1d_class()
    return kind is not None and isinstance(module, kind)


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` computes ``x Wᵀ + b``, with a weight that may be packed."""
    return isinstance(module, nn.Linear) or is_conv1d(module) or is_packed_linear(module)


def is_conv(module: nn.Module) -> bool:
    """Whether ``module`` is a convolution in one to three dimensions, which is no transposed one."""
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is stored ``[in, out]`` (Conv1D; an embedding is ``[tokens, dim]``)."""
    return isinstance(module, nn.Embedding) or is_conv1d(module)


def features(module: nn.Module) -> tuple[int, int]:
    """Return ``(in, out)``; for an embedding ``(number of tokens, dimension)``.

    What a convolution gets for one output are the channels of its group at each place of its kernel.
    """
    # From attributes where there are some: a weight that is worked out anew may change state when it is read.
    if isinstance(module, nn.Linear) or is_packed_linear(module):
        return module.in_features, module.out_features  # type: ignore[return-value]
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return module.in_channels // module.groups * math.prod(module.kernel_size), module.out_channels
    first, second = full_shape(weight_of(module))
    return (first, second) if is_transposed(module) else (second, first)


def weight_of(module: nn.Module) -> Tensor:
    """Return the weight as stored: a parameter, or the plain tensor that FSDP1 puts there while the module runs."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def own_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """Return the parameter ``name`` of ``module`` itself, if it has one."""
    # What TorchScript has in place of the dictionary knows no ``get``.
    return dict(module._parameters.items()).get(name)


def is_complex(module: nn.Module) -> bool:
    """Whether the weight holds complex numbers."""
    weight = own_parameter(module, "weight")
    return weight is not None and weight.is_complex()


def is_script(module: nn.Module) -> bool:
    """Whether ``module`` is TorchScript, scripted or traced: nothing can be attached to it."""
    return isinstance(module, torch.jit.ScriptModule)


def tensor_options(module: nn.Module) -> dict[str, Any]:
    """Return dtype (never below float32) and device for the adapter of any module: those of its first parameter."""
    # Quantisers keep codes and scales in buffers as well.
    tensors: list[Tensor] = [*module.parameters()] or [*module.buffers()]
    first = next((tensor for tensor in tensors if tensor.is_floating_point()), tensors[0] if tensors else None)
    if first is None:
        return {"dtype": torch.float32}
    wide = first.dtype in (torch.float32, torch.float64)
    return {"dtype": first.dtype if wide else torch.float32, "device": first.device}


def widened(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in at least float32, uncopied if it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def as_matrix(module: nn.Module, stored: Tensor) -> Tensor:
    """Return ``stored``, laid out as the module's weight, as ``[out, in]`` in at least float32, uncopied if it is."""
    wide = widened(stored)
    return wide.T if is_transposed(module) else wide.flatten(1)


def read_matrix(module: nn.Module) -> Tensor:
    """Return the whole weight as ``[out, in]`` in at least float32; not to be written to."""
    return as_matrix(module, whole(weight_of(module)))


def as_stored(module: nn.Module, matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``matrix`` ``[out, in]`` in the layout in which the module stores its weight."""
    matrix = matrix.T if is_transposed(module) else matrix.view(full_shape(weight_of(module)))
    return matrix.to(dtype)


def is_same(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one dtype and device have the same values; NaN is like NaN. They may be sparse."""
    mine, theirs = _parts(tensor), _parts(other)
    same_places = tensor.layout == other.layout and [part.shape for part in mine] == [part.shape for part in theirs]
    return same_places and all(map(_is_same, mine, theirs))


def _is_same(tensor: Tensor, other: Tensor) -> bool:
    return torch.equal(tensor, other) or bool(((tensor == other) | (tensor.isnan() & other.isnan())).all())


def _parts(tensor: Tensor) -> list[Tensor]:
    """Return the dense tensors that ``tensor`` consists of: torch compares no others."""
    if tensor.layout is torch.strided:
        return [tensor]
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce()
        return [tensor.indices(), tensor.values()]
    by_row = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
    places = [tensor.crow_indices(), tensor.col_indices()] if by_row else [tensor.ccol_indices(), tensor.row_indices()]
    return [*places, tensor.values()]
