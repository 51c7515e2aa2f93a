"""What strategies that shard the model have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.core.view import ModelView
from lightning_peft.strategy import refusals
from lightning_peft.strategy.lifecycle import Lifecycle
from lightning_peft.strategy.optimizers.averages import average_gradients
from lightning_peft.strategy.optimizers.kinds import (
    clip_by_norm,
    clip_by_value,
    mixture_explained,
    refuse_pieces,
    stepped_by_kind,
)


class OnShards(Lifecycle):
    """Averages gradients that the base strategy does not, and leaves no gathered weights behind.

    Adapters that every process holds whole have their gradients averaged after each backward pass, in one all-reduce.
    They are a thousandth of the model: sharded one by one, each would cost two small all-gathers and a reduce-scatter
    per step; averaged, they cost what they do under DDP.
    """

    _has_whole_weights = False
    _sync_blocked = False

    def setup(self, trainer: Any) -> None:
        """Set up, and clip gradients of what is whole and of what is in pieces together.

        Lightning refuses to clip by norm under FSDP1, where it would see parts of gradients. Ours are whole.
        """
        plugin = self.precision_plugin
        plugin.clip_grad_by_norm = clip_by_norm  # type: ignore[method-assign, assignment]
        plugin.clip_grad_by_value = clip_by_value  # type: ignore[method-assign, assignment]
        super().setup(trainer)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Leave gradients unaveraged inside, while they accumulate."""
        self._sync_blocked = True
        try:
            yield
        finally:
            self._sync_blocked = False

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Differentiate, and average the gradients before any hook sees them."""
        plugin = self.precision_plugin
        call_hooks = plugin.post_backward

        def average_first(loss: Tensor, module: Any) -> Tensor:
            if not self._sync_blocked:
                for parameters, group in self._replicated():
                    average_gradients(parameters, group)
            return call_hooks(loss, module)

        plugin.post_backward = average_first  # type: ignore[method-assign, assignment]
        try:
            with mixture_explained():
                return super().backward(closure_loss, optimizer, *args, **kwargs)
        finally:
            del plugin.post_backward

    def _restrict(self, optimizers: list[Optimizer], schedulers: list[Any]) -> None:
        super()._restrict(optimizers, schedulers)
        for optimizer in optimizers:
            refuse_pieces(optimizer)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own, in which manual optimization may clip."""
        with mixture_explained():
            return super().training_step(*args, **kwargs)

    def optimizer_step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Step parameters that are whole and parameters in pieces each by themselves."""
        with mixture_explained(), stepped_by_kind(optimizer):
            return super().optimizer_step(optimizer, *args, **kwargs)

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
        return [([p for p in self._module.parameters() if p.requires_grad], None)]
