"""What strategies that shard the model have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_peft.core.view import ModelView
from lightning_peft.strategy import refusals
from lightning_peft.strategy.lifecycle import Lifecycle
from lightning_peft.tensors.sharding import local_part


class OnShards(Lifecycle):
    """Averages gradients that the base strategy does not, and leaves no gathered weights behind.

    Adapters that every process holds whole have their gradients averaged after each backward pass, in one all-reduce.
    They are a thousandth of the model: sharded one by one, each would cost two small all-gathers and a reduce-scatter
    per step; averaged, they cost what they do under DDP.
    """

    _has_whole_weights = False
    _sync_blocked = False

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Leave gradients unaveraged inside, while they accumulate."""
        self._sync_blocked = True
        try:
            yield
        finally:
            self._sync_blocked = False

    def post_backward(self, closure_loss: Tensor) -> None:
        """Average the gradients."""
        super().post_backward(closure_loss)
        if not self._sync_blocked:
            for parameters, group in self._replicated():
                average_gradients(parameters, group)

    def _written(self, view: ModelView) -> set[str]:
        """Return the names of frozen weights that have changed; of one in pieces each process sees its own piece."""
        names = super()._written(view)
        if self._frozen is None:
            return names
        found = [names] * dist.get_world_size()
        dist.all_gather_object(found, names)
        return set[str]().union(*found)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return what is saved of the module.

        Raises:
            PEFTError: That is the frozen weights too, and adapters are merged into them.
        """
        if self._full_checkpoints:
            refusals.refuse_full_merged(ModelView(self._module))
        return super().lightning_module_state_dict()

    def _replicated(self) -> list[tuple[list[nn.Parameter], Any]]:
        """Return lists of trained parameters with the process group to average the gradients of each over."""
        return [([p for p in self._module.parameters() if p.requires_grad], None)]


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
