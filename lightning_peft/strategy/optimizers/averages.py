"""Gradients of parameters that several processes hold whole: each sees its share of the data, all step alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import LBFGS, Optimizer

from lightning_peft.errors import PEFTError
from lightning_peft.tensors.sharding import local_part

# What rounding may make of a sum in another order, and gradients of other data do not keep to.
_ROUNDING = 1e-3

BY_HAND = "In manual optimization, call self.manual_backward(loss) instead of loss.backward()."
"""What to do where gradients were not averaged."""


def average_gradients(parameters: Sequence[nn.Parameter], group: Any = None) -> None:
    """Replace each gradient by its mean over the processes of ``group``.

    A process in which a parameter took no part (its gradient is ``None``) counts as zero. Where it took part in none,
    the gradient stays ``None``.
    """
    grads = [local_part(torch.zeros_like(p) if p.grad is None else p.grad) for p in parameters]
    if not grads or dist.get_world_size(group) == 1:
        return
    took_part = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=grads[0].device)
    dtype = torch.promote_types(max((g.dtype for g in grads), key=lambda d: d.itemsize), torch.float32)
    flat = torch.cat([*(g.flatten().to(dtype) for g in grads), took_part.to(dtype)])
    dist.all_reduce(flat, group=group)
    flat[: -len(grads)] /= dist.get_world_size(group)
    *means, took_part = flat.split([*(g.numel() for g in grads), len(grads)])
    for parameter, grad, mean, count in zip(parameters, grads, means, took_part.tolist(), strict=True):
        if count:
            grad.copy_(mean.view_as(grad))
            if parameter.grad is None:
                parameter.grad = grad


def refuse_unaveraged(parameters: Sequence[nn.Parameter], group: Any = None) -> None:
    """Check that the processes of ``group``, all of which have to call this, are about to step by the same gradients.

    Raises:
        PEFTError: They are not; raised on every process.
    """
    grads = [torch.zeros(()) if p.grad is None else local_part(p.grad) for p in parameters]
    if not grads or dist.get_world_size(group) == 1:
        return
    largest = torch.stack([grad.abs().sum().to(parameters[0].device, torch.float32) for grad in grads])
    smallest = largest.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    dist.all_reduce(smallest, dist.ReduceOp.MIN, group)
    if differing := int((largest - smallest > _ROUNDING * largest).sum()):
        raise PEFTError(
            f"The gradients of {differing} parameters differ between processes: they were not averaged, so the "
            f"processes would train different adapters. {BY_HAND}"
        )


def refuse_diverging(optimizers: Iterable[Optimizer]) -> None:
    """Check that all processes will take the same steps by the same gradients.

    Raises:
        PEFTError: They may not.
    """
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if several and any(isinstance(optimizer, LBFGS) for optimizer in optimizers):
        raise PEFTError(
            "LBFGS decides by its loss and by sums over all parameters how often to differentiate in a step. The sums "
            "round differently on each process, so that one would wait for what another does not do. Use another "
            "optimizer, or one process."
        )
