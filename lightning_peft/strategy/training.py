"""What a run does with optimizers: they hold what is trained, and methods act around their steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from traceback import walk_tb
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_peft.callbacks.summary import PEFTSummary
from lightning_peft.core.adapter import Slot, clean_name
from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError, listed
from lightning_peft.files.likeness import refuse_unlike
from lightning_peft.operations.shards import resharded
from lightning_peft.strategy import refusals
from lightning_peft.strategy.optimizers.accumulated import Accumulated
from lightning_peft.strategy.optimizers.averages import refuse_diverging, refuse_unaveraged
from lightning_peft.strategy.optimizers.optim import (
    held_parameters,
    restrict_to_trainable,
    state_by_name,
    state_by_position,
)
from lightning_peft.strategy.optimizers.param_groups import has_lost_ratios
from lightning_peft.strategy.optimizers.schedule import (
    after_step,
    before_step,
    changes_gradients,
    has_schedule,
    known_steps,
)


class Training(Accumulated):
    """Optimizers of adapters: their param groups, their steps and their state. ``super()`` is the base strategy."""

    methods: tuple[PEFTMethod, ...]
    _has_whole_weights: ClassVar[bool]
    _total_steps: int | None = None
    _ratios_told = False
    _stepped: set[int]
    """The optimizers that have stepped in this run, by id."""
    _slots: Sequence[Slot]
    """Those of the modules that were adapted when the run began."""
    _read_states: set[int]
    """The optimizers whose state was read, and that have not stepped since, by id."""
    _ran: set[str]
    """The names of the adapters that were active in the last step."""

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        """Call ``configure_optimizers`` and restrict what it returned to what is trained."""
        super().setup_optimizers(trainer)
        # SWA sets learning rates too, and may have been given one for each group of the user's.
        swa = [c for c in trainer.callbacks if isinstance(c, StochasticWeightAveraging)]  # type: ignore[attr-defined]
        self._restrict(self.optimizers, [*(config.scheduler for config in self.lr_scheduler_configs), *swa])
        if has_schedule(self.methods):
            self._total_steps = steps = known_steps(self.methods, trainer.estimated_stepping_batches)
            if steps is not None and self._is_real_run():
                for method in self.methods:
                    method.check_steps(steps)

    def _restrict(self, optimizers: list[Optimizer], schedulers: list[Any]) -> None:
        """Restrict ``optimizers`` to what is trained, and know its names from then on."""
        refuse_diverging(optimizers)
        restrict_to_trainable(optimizers, schedulers, self._module)
        names = {id(parameter): clean_name(name) for name, parameter in self._module.named_parameters()}
        self._held = {id(p): names[id(p)] for p in held_parameters(optimizers) if id(p) in names}
        if outside := [p for p in held_parameters(optimizers) if id(p) not in names and p.requires_grad]:
            rank_zero_warn(
                f"The optimizers hold {len(outside)} parameters that are not in the module: no checkpoint has them. "
                "Assign the module that they belong to to an attribute of the LightningModule."
            )

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load optimizer states, which are saved by parameter name."""
        saved = checkpoint["optimizer_states"]
        if not isinstance(saved, list) or not all(isinstance(each, Mapping) for each in saved):
            raise PEFTError("The checkpoint's states of optimizers are damaged. Take another checkpoint.")
        if len(saved) != len(self.optimizers):
            raise PEFTError(
                f"The checkpoint has the states of {len(saved)} optimizers, configure_optimizers made "
                f"{len(self.optimizers)}. Make those that it was saved with."
            )
        states = [state_by_position(o, s, self._module) for o, s in zip(self.optimizers, saved, strict=True)]
        for optimizer, state in zip(self.optimizers, states, strict=True):
            if "param_groups" in state:
                present = optimizer.state_dict()["param_groups"]
                refuse_unlike(state["param_groups"], present, f"the param groups of {type(optimizer).__name__}")
        schedulers = [config.scheduler for config in self.lr_scheduler_configs]
        # Of others nobody knows what they keep.
        known = [s.state_dict() if type(s).__module__.startswith("torch.") else None for s in schedulers]
        refuse_unlike(checkpoint.get("lr_schedulers", []), known, "learning-rate schedulers")
        try:
            super().load_optimizer_state_dict({**checkpoint, "optimizer_states": states})
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, OverflowError) as error:
            raise _damaged(self.optimizers, error) from error
        self._read_states = {id(optimizer) for optimizer in self.optimizers}

    def pre_backward(self, closure_loss: Tensor) -> None:
        """Check that there is something to differentiate, where the module leaves that to Lightning.

        Raises:
            PEFTError: The loss depends on no adapter.
        """
        super().pre_backward(closure_loss)
        if closure_loss.requires_grad or is_overridden("backward", self._module) or not ModelView(self._module).slots:
            return
        adapters = [name for name, p in ModelView(self._module).adapter_parameters.items() if not p.requires_grad]
        if adapters and len(adapters) == len(ModelView(self._module).adapter_parameters):
            raise PEFTError(
                f"All adapters are frozen, {adapters[0]!r} among them, so nothing can be trained: something has called "
                "requires_grad_(False) on them since setup. The strategy freezes the base; leave that call out."
            )
        raise PEFTError(
            "The loss depends on no adapter, so nothing can be trained: their modules were not called, or under "
            "no_grad. Gradient checkpointing with use_reentrant=True loses adapters as well, where what a model is "
            "given requires no gradient: set gradient_checkpointing_kwargs={'use_reentrant': False}, or call "
            "model.enable_input_require_grads()."
        )

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Step; after the first one, name the adapters that got no gradient.

        Raises:
            PEFTError: The module has switched to an adapter that no optimizer holds, or gradients were not averaged.
        """
        skipped, manual = False, not self._module.automatic_optimization

        def closure_and_more() -> Any:
            nonlocal skipped
            result = closure()
            # What `training_step` returned; in manual optimization the gradients are there already.
            skipped = result is None and not manual
            if manual and id(optimizer) not in self._stepped:
                self._refuse_unaveraged(optimizer)
            if changes_gradients(self.methods):
                scaler = getattr(self.precision_plugin, "scaler", None)
                before_step(self._module, 1.0 if scaler is None else scaler.get_scale())
            return result

        try:
            output = super().optimizer_step(optimizer, closure_and_more, model, **kwargs)
        except Exception as error:
            if id(optimizer) in self._read_states and _is_raised_by(optimizer, error):
                raise _damaged([optimizer], error) from error
            raise
        self._read_states -= {id(optimizer)}
        self._check_running()
        if not self._ratios_told and has_lost_ratios(optimizer):
            self._ratios_told = True
            rank_zero_warn(
                "The method asks for a higher learning rate of some parameters (loraplus_lr_ratio), but something sets "
                "one rate for all param groups: an optimizer_step, or a scheduler that does not go by its base_lrs. "
                "Multiply what is there (group['lr'] *= ...), or leave the ratio out."
            )
        if id(optimizer) not in self._stepped and not skipped:
            self._stepped.add(id(optimizer))
            self._warn_without_gradient(optimizer)
        if has_schedule(self.methods):
            # Lightning counts this step when it has returned.
            after_step(self._module, self._module.trainer.global_step + 1, self._total_steps)
        return output

    def _refuse_unaveraged(self, optimizer: Optimizer) -> None:
        held = {id(p) for p in held_parameters([optimizer])}
        for parameters, group in self._replicated():
            refuse_unaveraged([p for p in parameters if id(p) in held], group)

    def _check_running(self) -> None:
        """Check that an adapter that did not run in the last step, and does now, is trained."""
        if self._ran != (running := {slot.active for slot in self._slots}):
            self._ran = running
            # An optimizer may have got parameters since, and DeepSpeed's holds others than it was given.
            held = self._held.keys() | {id(p) for p in held_parameters(self.optimizers)}
            # In manual optimization a network may be gathered that is not differentiated before the next step.
            refusals.refuse_untrained(resharded(self._module), held)

    def _warn_without_gradient(self, optimizer: Optimizer) -> None:
        view, held = ModelView(self._module), {id(p) for p in held_parameters([optimizer])}
        active = [adapter for _, _, slot in view.slots if (adapter := slot.active_adapter) is not None]
        called = held & {id(p) for adapter in active for p in adapter.parameters()}
        names = {name: p for name, p in view.adapter_parameters.items() if id(p) in called}
        idle = [name for name, parameter in names.items() if parameter.grad is None]
        if idle:
            rank_zero_warn(
                f"{len(idle)} adapter parameters got no gradient in the first step, so their modules were not called, "
                f"under no_grad, or checkpointed with use_reentrant=True: {', '.join(idle[:5])}. If they never are, "
                "leave them out with exclude_modules; or, if they are copies that follow other modules, freeze them "
                "before fit, requires_grad_(False): then their adapters begin as those do."
            )
        gradients = [parameter.grad for parameter in names.values() if parameter.grad is not None]
        # Of pieces a process may have those alone that begin with a gradient of zero, such as A of a LoRA.
        if gradients and self._has_whole_weights and not any(bool(gradient.abs().sum()) for gradient in gradients):
            rank_zero_warn(
                "All gradients of adapters were zero in the first step, so nothing was learned in it: the loss does "
                "not depend on them, or no text has the tokens that activate them (alora_invocation_tokens). Look at "
                "the first batch, and stop here if that is not meant."
            )

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the optimizer's state by parameter name."""
        return state_by_name(optimizer, super().optimizer_state(optimizer), self._module)

    def _is_real_run(self) -> bool:
        # The learning-rate finder and the batch-size scaler run short fits of their own, for which they put other
        # callbacks in place of the trainer's.
        trainer = self._module.trainer
        return not trainer.fast_dev_run and any(isinstance(c, PEFTSummary) for c in trainer.callbacks)  # type: ignore[attr-defined]

    @property
    def _module(self) -> pl.LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module


def _damaged(optimizers: Sequence[Optimizer], error: Exception) -> PEFTError:
    names = listed(dict.fromkeys(type(optimizer).__name__ for optimizer in optimizers))
    return PEFTError(
        f"{names} cannot go on from the state that the checkpoint has: {type(error).__name__}: {error}. Take another "
        "checkpoint, or begin anew from its adapter, with init_adapter."
    )


def _is_raised_by(optimizer: Optimizer, error: Exception) -> bool:
    """Whether an error comes from the code of an optimizer, and not from a closure or hook that it has called."""
    innermost = str([frame for frame, _ in walk_tb(error.__traceback__)][-1].f_globals.get("__name__"))
    return innermost == type(optimizer).__module__ or innermost.startswith("torch.optim.")
