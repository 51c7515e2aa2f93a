"""Gradients of batches that no step has been taken with yet: a checkpoint in the middle of an accumulation has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.errors import PEFTError
from lightning_peft.strategy.optimizers.averages import average_gradients
from lightning_peft.strategy.optimizers.finite import FiniteSteps
from lightning_peft.strategy.optimizers.optim import held_parameters, parameter_names
from lightning_peft.tensors.sharding import like, whole


class Accumulated(FiniteSteps):
    """Knows which gradients wait for a step, and puts those of a checkpoint back. ``super()`` is the base strategy."""

    _waiting: frozenset[int] = frozenset()
    """The optimizers that have not stepped since a loss was last differentiated, by id."""
    _to_go_on_with: Mapping[str, Tensor] | None = None
    """The gradients, by name, of the checkpoint from which this run is about to go on."""

    def connect(self, model: pl.LightningModule) -> None:
        """Attach the module, of which no loss has been differentiated yet."""
        super().connect(model)
        self._waiting, self._to_go_on_with = frozenset(), None

    def post_backward(self, closure_loss: Tensor) -> None:
        """Note that there are gradients to step by."""
        super().post_backward(closure_loss)
        self._waiting = frozenset(map(id, self.optimizers))

    def optimizer_step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Step, or leave the step out: its gradients are done with either way."""
        try:
            return super().optimizer_step(optimizer, *args, **kwargs)
        finally:
            self._waiting -= {id(optimizer)}

    def _accumulated(self) -> dict[str, Tensor]:
        """Return by name, whole, the gradients that wait for a step; a collective call.

        Processes that have gradients of their own share of the data get the mean, which is what a step would take: what
        is added later is averaged with it once more. So a run that was resumed goes on exactly as this one does.
        """
        waiting = [optimizer for optimizer in self.optimizers if id(optimizer) in self._waiting]
        if waiting:
            for parameters, group in self._replicated():
                average_gradients(parameters, group)
        return {
            name: whole(parameter.grad)
            for optimizer in waiting
            for name, parameter in self._named(optimizer).items()
            if parameter.grad is not None
        }

    def _go_on_with(self, gradients: Any) -> None:
        """Keep what :meth:`_accumulated` returned until training starts.

        Raises:
            PEFTError: It is something else.
        """
        if not isinstance(gradients, Mapping) or not all(isinstance(value, Tensor) for value in gradients.values()):
            raise PEFTError("The checkpoint's accumulated gradients are damaged. Take another checkpoint.")
        self._to_go_on_with = gradients

    def on_train_start(self) -> None:
        """Put the gradients back to which the next batches add theirs.

        Raises:
            PEFTError: They are of other parameters, or of other shapes, than those that the optimizers hold.
        """
        super().on_train_start()
        gradients, self._to_go_on_with = self._to_go_on_with or {}, None
        held = {name: p for optimizer in self.optimizers for name, p in self._named(optimizer).items()}
        for name, gradient in gradients.items():
            parameter = held.get(name)
            if parameter is None or parameter.shape != gradient.shape:
                raise PEFTError(
                    f"The checkpoint has an accumulated gradient of {name!r}, of shape {tuple(gradient.shape)}, and "
                    "the optimizers hold no such parameter. Make those that it was saved with, or take a checkpoint "
                    "of another step."
                )
            parameter.grad = like(parameter, gradient.to(parameter.device, parameter.dtype))
        self._waiting = frozenset(map(id, self.optimizers)) if gradients else frozenset()

    def _named(self, optimizer: Optimizer) -> dict[str, nn.Parameter]:
        assert self.lightning_module is not None
        return dict(zip(parameter_names(optimizer, self.lightning_module), held_parameters([optimizer]), strict=True))

    def _replicated(self) -> list[tuple[list[nn.Parameter], Any]]:
        """Return trained parameters that several processes have whole, with the process group of each list of them."""
        return []
