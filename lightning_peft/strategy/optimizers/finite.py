"""What is done about a loss or a gradient that is not finite: no optimizer takes the step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributed import all_gather_object
from torch.optim import Optimizer

from lightning_peft.strategy.optimizers.optim import held_parameters
from lightning_peft.tensors.finite import is_suspect, not_finite

OnNonfinite = Literal["stop", "skip", "restore"]
STOP, SKIP, RESTORE = "stop", "skip", "restore"

_IN_A_ROW = 10
"""So many steps are left out one after another before the run stops: it would learn nothing more."""


class _NotTakenError(Exception):
    """Leaves an optimizer within its step, before it has changed anything."""


class FiniteSteps(Strategy):
    """Looks at loss and gradients before each step of an optimizer. ``super()`` is the base strategy."""

    _on_nonfinite: OnNonfinite
    _instead: ClassVar[str] = (
        " PEFTStrategy(on_nonfinite='skip') leaves such steps out, 'restore' goes back to the last checkpoint."
    )
    """What else can be done than stop, for those who have a run that stops."""
    _held: Mapping[int, str] = MappingProxyType({})
    """The names of the module's parameters that optimizers held at ``setup``, by id."""
    _saved: Sequence[str] = ()
    """The checkpoints of this run from which it can go on, the newest last."""

    _diverged: str | None = None
    """Why the run has been stopped."""
    _not_taken = 0
    """How many steps, up to the last one, were not taken."""

    def connect(self, model: pl.LightningModule) -> None:
        """Attach the module, of which nothing is known yet."""
        super().connect(model)
        self._saved, self._diverged, self._not_taken = (), None, 0

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Step, if loss and gradients are finite on all processes."""
        evaluations, fault = 0, None

        def closure_and_check() -> Any:
            nonlocal evaluations, fault
            result = closure()
            evaluations += 1
            fault = self._diverged or self._fault(optimizer, result)
            if fault is not None:
                raise _NotTakenError
            return result

        try:
            output = super().optimizer_step(optimizer, closure_and_check, model, **kwargs)
        except _NotTakenError:
            if self._diverged is None:
                self._leave_out(f"At step {self._trainer.global_step} {fault}.", whole=evaluations == 1)
            return None
        self._not_taken = 0
        return output

    def _fault(self, optimizer: Optimizer, loss: Any) -> str | None:
        """Return what is not finite; if something is so on another process, it is that one's to say."""
        if not self._is_real_run():
            return None
        tensors = {"the loss": loss} if isinstance(loss, Tensor) else {}
        gradients = self._gradients(optimizer)
        suspect = is_suspect([*tensors.values(), *gradients.values()]).to(self.root_device, torch.float32)
        if not self.reduce(suspect, reduce_op="sum"):
            return None
        tensors |= {f"the gradient of {name!r}": gradient for name, gradient in gradients.items()}
        faults = [" and ".join(not_finite(tensors)[:2])]
        if self._trainer.world_size > 1:
            faults *= self._trainer.world_size
            all_gather_object(faults, faults[0])
        found = next(filter(None, faults), None)
        return None if found is None else f"{found} holds NaN or infinity"

    def _gradients(self, optimizer: Optimizer) -> dict[Any, Tensor]:
        """Return what has to be finite for a step, by the parameters' names; called on all processes."""
        if self._scales():
            return {}
        gradients = ((id(p), p.grad) for p in held_parameters([optimizer]))
        return {self._held.get(key, key): gradient for key, gradient in gradients if gradient is not None}

    def _scales(self) -> bool:
        """Whether gradients are scaled: then they overflow now and then, and the scaler leaves the step out itself.

        A scale that has come down to one is not what makes them overflow.
        """
        scaler = getattr(self.precision_plugin, "scaler", None)
        return scaler is not None and scaler.is_enabled() and scaler.get_scale() > 1

    def _leave_out(self, fault: str, whole: bool) -> None:
        """Do what the user has chosen for a step that was not taken.

        Args:
            fault: What was not finite.
            whole: Whether nothing of the step was done; some optimizers evaluate the loss several times in one.
        """
        self._not_taken += 1
        goes_back = self._on_nonfinite == RESTORE and self._not_taken < _IN_A_ROW
        saved = self._last_readable() if goes_back else next(reversed(self._saved), None)
        if goes_back and saved is not None:
            self._go_back_to(saved)
            rank_zero_warn(f"{fault} The adapters and the optimizer's state are those of {saved} again.")
        elif self._on_nonfinite == SKIP and whole and self._not_taken < _IN_A_ROW:
            rank_zero_warn(f"{fault} The step was left out.")
        else:
            self._diverged = fault
            self._trainer.should_stop = True
            rank_zero_warn(
                f"{fault} The run stops: that step was not taken{_in_a_row(self._not_taken)}. "
                + (f"The last checkpoint is {saved}." if saved else "There is no checkpoint yet.")
                + self._instead
            )

    def _last_readable(self) -> str | None:
        """Return the newest checkpoint that is still there, and whole, on all processes."""
        for saved in reversed(self._saved):
            lost = torch.tensor(float(not self._is_readable(saved)), device=self.root_device)
            if not self.reduce(lost, reduce_op="sum"):
                return saved
            rank_zero_warn(f"{saved} is gone or damaged: the run cannot go back to it.")
        return None

    def _go_back_to(self, saved: str) -> None:
        """Load adapters and optimizers' states; learning rates stay, since schedules go on from this step."""
        checkpoint = self.load_checkpoint(saved)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        now = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        self.load_model_state_dict(checkpoint)
        self.load_optimizer_state_dict(checkpoint)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group, values in zip(groups, now, strict=True):
            group.update(values)

    @abstractmethod
    def _is_readable(self, saved: str) -> bool:
        """Whether a checkpoint of this run is still there, and whole."""

    @abstractmethod
    def _is_real_run(self) -> bool:
        """Whether this is none of the short fits of Lightning's tuner, which look for where a run diverges."""

    @property
    def _trainer(self) -> pl.Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer


def _in_a_row(steps: int) -> str:
    return f", nor the {steps - 1} before it" if steps > 1 else ""
