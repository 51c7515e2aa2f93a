"""Lightning's averages of weights, taken of what is trained: ``WeightAveraging``, ``EMAWeightAveraging`` and SWA.

These callbacks copy the module in their ``setup``, when there are no adapters yet, and average all of it. Here they
are given another module to work on, which holds nothing but what optimizers train, under the same names: they average,
swap, save and load that. So a class is made of each of them, or of a user's that derives from one, with a class of this
file next above Lightning's; a user's own hooks are called with the module itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.callbacks.last import WritesDirectories
from lightning_peft.callbacks.other_lightning import refuse_other_lightning
from lightning_peft.core.registry import trained_whole, trains_everything
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError

_NONE: Mapping[str, Any] = MappingProxyType({})


def average_what_is_trained(callbacks: Iterable[Callback], strategy: Strategy) -> None:
    """Have those of ``callbacks`` that average weights do so with what is trained, before they are set up.

    Raises:
        PEFTError: There is one, and ``strategy`` keeps in pieces what is trained; or it is of another distribution of
            Lightning.
    """
    for callback in callbacks:
        if {kind.__name__ for kind in type(callback).__mro__} & {ours._lightnings.__name__ for ours in _OURS}:
            refuse_other_lightning(callback, f"The callback {type(callback).__name__}")
        ours = next((ours for ours in _OURS if isinstance(callback, ours._lightnings)), None)
        if ours is None or isinstance(callback, ours):
            continue
        if isinstance(strategy, DeepSpeedStrategy | ModelParallelStrategy):
            raise PEFTError(
                f"{type(callback).__name__} averages what every process holds whole, but {type(strategy).__name__} has "
                "what is trained in pieces. Leave it out of the callbacks, or use another base, such as 'ddp'."
            )
        callback.__class__ = _class_for(type(callback), ours)  # type: ignore[assignment, arg-type]


class Trained(pl.LightningModule):
    """What is trained of another module: the tensors themselves, under the names that they have there."""

    def __init__(self, tensors: Mapping[str, Tensor] = _NONE, norms: Mapping[str, nn.Module] = _NONE) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            owner, leaf = self._owner(name)
            if isinstance(tensor, nn.Parameter):
                owner._parameters[leaf] = tensor
            else:
                owner._buffers[leaf] = tensor
        for name, norm in norms.items():
            owner, leaf = self._owner(name)
            owner._modules[leaf] = norm

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        """Return the module that ``name`` is in, and its name there."""
        *path, leaf = name.split(".")
        owner: nn.Module = self
        for part in path:
            owner = owner._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
        return owner, leaf

    @property
    def device(self) -> torch.device:
        """Where the tensors are; with this, Lightning decides where the average is kept."""
        return next((parameter.device for parameter in self.parameters()), torch.device("cpu"))


def trained(module: nn.Module, optimizers: Iterable[Optimizer]) -> Trained:
    """Return what ``optimizers`` train of ``module``, and the buffers that change with it."""
    view = ModelView(module)
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    found = {**view.adapter_parameters, **{name: tensor for name, tensor, _ in trained_whole(view)}}
    found |= view.buffers if trains_everything(view) else {}
    tensors = {n: t for n, t in found.items() if id(t) in held or not isinstance(t, nn.Parameter)}
    ids = set(map(id, tensors.values()))
    norms = {
        name: part
        for name, part in view.modules.items()
        if isinstance(part, nn.modules.batchnorm._BatchNorm)
        and ids.issuperset(map(id, part.state_dict(keep_vars=True).values()))
    }
    # Batch norms that are trained whole stand there themselves: SWA resets their statistics.
    return Trained(tensors, norms)


class _OnTrained(Callback):
    """Stands above one of Lightning's callbacks, and calls its hooks with what is trained in place of the module."""

    _lightnings: ClassVar[type[Callback]]
    """Lightning's class."""
    _before: ClassVar[type[Callback]]
    """The class that the callback had before this one: Lightning's, or a user's."""
    _trained: Trained
    _held_back: dict[str, Any] | None
    """What was to be loaded before there were adapters."""

    def __reduce__(self) -> Any:
        # This class was made at run time, so pickle would not find it. The strategy makes it anew.
        return object.__new__, (self._before,), vars(self)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin with an average of nothing, until there are adapters; in another trainer, be what it was before."""
        if not isinstance(trainer.strategy, WritesDirectories):
            lightnings, self.__class__ = self._lightnings, self._before  # type: ignore[assignment]
            lightnings.setup(self, trainer, pl_module, stage)
            return
        self._trained, self._held_back = Trained(), None
        super().setup(trainer, self._trained, stage)

    def _start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the average of what is trained."""
        self._trained = trained(pl_module, trainer.optimizers)
        super().setup(trainer, self._trained, "fit")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give what is trained its average."""
        super().on_train_end(trainer, self._trained)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the module alone from now on: it has its average, and may be given other values."""
        super().teardown(trainer, pl_module, stage)
        self._trained = Trained()


class _Averages(_OnTrained, WeightAveraging):
    """``WeightAveraging`` of what is trained."""

    _lightnings = WeightAveraging

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the average, as it was in the checkpoint from which training goes on."""
        super().on_fit_start(trainer, pl_module)
        self._start(trainer, pl_module)
        if self._held_back is not None:
            self._load(trainer, self._held_back)
            self._held_back = None
        if any(getattr(saver, "save_weights_only", False) for saver in trainer.checkpoint_callbacks):
            rank_zero_warn(
                f"save_weights_only=True beside {type(self).__name__}: Lightning asks no callback when it saves only "
                "weights, so these checkpoints hold the weights of the last step and not their average."
            )

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any) -> None:
        super().on_train_batch_end(trainer, self._trained, *args, **kwargs)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_end(trainer, self._trained)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_epoch_start(trainer, self._trained)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_epoch_end(trainer, self._trained)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the average in the place of what is trained; the rest of the state stays."""
        if state := self._trained.state_dict():
            rest = checkpoint["state_dict"]
            checkpoint["state_dict"] = state
            super().on_save_checkpoint(trainer, self._trained, checkpoint)
            checkpoint["state_dict"] = {**rest, **checkpoint["state_dict"]}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Load the average and what is trained, when there is any."""
        # To evaluate, the average is loaded as weights are.
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if self._trained.state_dict():
            self._load(trainer, checkpoint)
        else:
            self._held_back = checkpoint

    def _load(self, trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
        # There is more in it: buffers that have changed, or with checkpoint="full" all that is frozen.
        own = self._trained.state_dict()
        state = {name: value for name, value in checkpoint["state_dict"].items() if name in own}
        super().on_load_checkpoint(trainer, self._trained, {**checkpoint, "state_dict": state})


class _StochasticAverages(_OnTrained, StochasticWeightAveraging):
    """``StochasticWeightAveraging`` of what is trained."""

    _lightnings = StochasticWeightAveraging

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the average, as it was in the checkpoint from which training goes on."""
        self._start(trainer, pl_module)
        if self._held_back is not None:
            super().load_state_dict(self._held_back)
            self._held_back = None
        super().on_fit_start(trainer, self._trained)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_start(trainer, self._trained)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, which can be read back."""
        state = super().state_dict()
        return {**state, "scheduler_state": _readable(state["scheduler_state"])}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        checkpoint["lr_schedulers"] = [_readable(state) for state in checkpoint["lr_schedulers"]]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state, when there is something to average."""
        if self._trained.state_dict():
            super().load_state_dict(state_dict)
        else:
            self._held_back = state_dict


def _readable(state: dict[str, Any] | None) -> dict[str, Any] | None:
    """Leave out what torch before 2.10 puts into the state of ``SWALR``: a function, which no resume reads."""
    return state and {key: value for key, value in state.items() if key != "anneal_func"}


_OURS: tuple[type[_OnTrained], ...] = (_Averages, _StochasticAverages)


@cache
def _class_for(theirs: type[Callback], ours: type[_OnTrained]) -> type[Callback]:
    # The name is that of the state in checkpoints.
    content = {"__module__": theirs.__module__, "__qualname__": theirs.__qualname__, "_before": theirs}
    bases = (ours,) if issubclass(ours, theirs) else (theirs, ours)
    return type(theirs.__name__, bases, {**content, "__doc__": theirs.__doc__})
