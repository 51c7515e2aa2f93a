"""Whether tensors hold NaN or infinity."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from lightning_peft.tensors.sharding import local_part


def is_suspect(tensors: Iterable[Tensor]) -> Tensor:
    """Return, in a tensor that nobody waits for, whether what this process holds of ``tensors`` may not be finite.

    It is the norm of all that is looked at, in a few kernels however many tensors there are. Values that are finite but
    too large to be squared are suspect too.
    """
    with torch.no_grad():
        return ~get_total_norm([_dense(tensor) for tensor in tensors], error_if_nonfinite=False).isfinite()


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of those of ``tensors`` of which this process holds NaN or infinity."""
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    if not is_suspect(floating.values()):
        return []
    return [name for name, tensor in floating.items() if not _dense(tensor).isfinite().all()]


def _dense(tensor: Tensor) -> Tensor:
    if type(tensor) is Tensor and tensor.dtype is torch.float32 and tensor.layout is torch.strided:
        return tensor  # as nearly all gradients are, of which each step has hundreds
    local = local_part(tensor.detach())
    values = local.coalesce().values() if local.is_sparse else local
    return values if values.dtype in (torch.float32, torch.float64) else values.float()
