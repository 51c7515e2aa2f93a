"""PEFTStrategy: one flag that turns a Lightning run into a parameter-efficient one.

An instance belongs to a class that is made for its base strategy (``PEFTDDPStrategy`` and so on) and derives from that
one's class, so that Lightning's own ``isinstance`` checks keep their meaning.
"""

from __future__ import annotations

import dataclasses
import os
from contextlib import suppress
from functools import cache
from typing import Any, ClassVar, Literal, get_args

from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerStatus

from lightning_peft.callbacks.other_lightning import let_in, refuse_other_lightning
from lightning_peft.core.method import PEFTMethod, methods_of, registered_methods
from lightning_peft.errors import PEFTError, refuse_arguments
from lightning_peft.formats.peft_config.reading import without_peft_configs
from lightning_peft.strategy.bases import behaviour
from lightning_peft.strategy.bases.auto import AUTO, SINGLE_DEVICE, choose_strategy
from lightning_peft.strategy.bases.names import base_names, strategy_from_name
from lightning_peft.strategy.bases.spawn import PEFTMultiProcessingLauncher
from lightning_peft.strategy.leaving import UNLOAD
from lightning_peft.strategy.lifecycle import Lifecycle
from lightning_peft.strategy.optimizers.finite import OnNonfinite
from lightning_peft.targets.patterns import as_list

_OF_METHODS = {
    field.name: f"PEFTStrategy({cls.__name__}({field.name}={{}})): hyper-parameters are a method's"
    for cls in sorted(registered_methods().values(), key=lambda cls: cls.name == "lora")
    for field in dataclasses.fields(cls)  # type: ignore[arg-type]
}
"""What to write for the names of hyper-parameters; the last that has one is LoRA."""


class _Checked(Lifecycle):
    """Checks the names of options. A class of its own: jsonargparse would take the signature for ``PEFTStrategy``'s."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Refuse names that there are not, before Python does in words of its own."""
        refuse_arguments(cls, args, kwargs, _OF_METHODS)
        return super().__new__(cls)


class PEFTStrategy(_Checked):
    """Fine-tune adapters instead of the model, on top of any Lightning strategy.

    At ``setup`` the adapters are injected; optimizers are restricted to what is trained; every checkpoint holds adapter
    state only; after training the adapters are merged into the weights.

    Args:
        method: What to train: a method such as ``LoRA(r=8)``, its registered name, or a list of several that make one
            adapter together. A configuration of HF PEFT, such as ``peft.LoraConfig(...)``, is read by its fields, with
            the modules that it trains whole beside those of ``train_also``.
        base: The strategy underneath: ``"auto"``, a registered name such as ``"ddp"``, or a configured strategy.
        merge_on_train_end: Merge the adapters into the weights when training has ended. The adapters and a copy of the
            adapted weights in host memory are kept, so that ``unmerge``, ``test(ckpt_path="best")`` and another ``fit``
            work. ``"unload"`` removes the adapters for good: a plain module is left behind, by ``load_from_checkpoint``
            too, for code that saves, reloads or compiles modules itself. ``False`` leaves the adapters attached.
        checkpoint: ``"adapter"`` writes adapter state only, ``"full"`` the frozen weights as well; with ``"unload"`` so
            that the file's ``state_dict`` is that of the plain module.
        train_also: Patterns of modules to train whole and to save with the adapter, such as a classification head. If
            not given, what the module names in an attribute ``train_also``, as the ready task with a new head does.
        train_mode: Put transformers models, which arrive in eval mode, into train mode when fit starts: in eval mode
            their dropout is off and gradient checkpointing does nothing.
        on_nonfinite: What becomes of a step whose loss or gradients hold NaN or infinity, which no optimizer takes.
            ``"stop"`` ends the run, ``"skip"`` leaves the step out, ``"restore"`` goes back to the adapters and the
            optimizer's state of the last checkpoint. Ten such steps in a row end the run in any case.
        base_weights: A directory of safetensors that ``save_pretrained`` wrote, for a model that was built without
            weights (``trainer.init_module(empty_init=True)`` in ``configure_model``): they are loaded at ``setup``, one
            tensor at a time and by each process its own part.
        init_adapter: An adapter that training begins with, instead of a new one: a directory of this package or of HF
            PEFT, or a ``.ckpt`` that this strategy wrote. What it is stands in it, so that ``method`` may be left out;
            one that is given has to be the same. What a directory brings beside an adapted transformers model, such as
            a head, is loaded, and trained on if ``train_also`` names it. A run that is resumed goes on with its
            checkpoint.
    """

    _own_class: ClassVar[type[PEFTStrategy] | None] = None
    """What a class that was made for a base was made of: this class, or one that derives from it."""
    _as_made: tuple[type[Strategy] | None, dict[str, Any]] | None = None
    """The class of the base, and this object's state, when a Trainer was first given it."""

    def __init__(
        self,
        method: PEFTMethod | str | list[PEFTMethod | str] = "lora",
        base: Strategy | str = "auto",
        *,
        merge_on_train_end: bool | Literal["unload"] = True,
        checkpoint: Literal["adapter", "full"] = "adapter",
        train_also: list[str] | str | None = None,
        train_mode: bool = True,
        on_nonfinite: OnNonfinite = "stop",
        base_weights: str | None = None,
        init_adapter: str | os.PathLike[str] | None = None,
    ) -> None:
        let_in(PEFTStrategy)
        if base in (AUTO, SINGLE_DEVICE):
            Strategy.__init__(self)
            # What the Trainer's connector sets if it is there; `_choose_base` hands it on.
            self.__dict__.update(cluster_environment=None, parallel_devices=None, num_nodes=1, _layer_sync=None)
        else:
            self._become(_checked(base))
        method, self._configs_whole = without_peft_configs(method)
        self.methods = methods_of(method)
        # A name asks for no hyper-parameters.
        entries = [method] if isinstance(method, PEFTMethod | str) else method
        self._asked = [isinstance(entry, PEFTMethod) for entry in entries]
        self._base_name = base if isinstance(base, str) else type(base).__name__
        if checkpoint not in ("adapter", "full"):
            raise PEFTError(f"checkpoint={checkpoint!r} was given; it is 'adapter' or 'full'.")
        if merge_on_train_end not in (True, False, UNLOAD):
            raise PEFTError(f"merge_on_train_end={merge_on_train_end!r} was given; it is True, False or '{UNLOAD}'.")
        if on_nonfinite not in get_args(OnNonfinite):
            raise PEFTError(f"on_nonfinite={on_nonfinite!r} was given; it is 'stop', 'skip' or 'restore'.")
        self._on_nonfinite = on_nonfinite
        self._full_checkpoints = checkpoint == "full"
        self._merge_on_train_end = merge_on_train_end
        self._train_also = None if train_also is None else as_list(train_also)
        self._train_mode = train_mode
        self._base_weights = base_weights
        if init_adapter is not None and base_weights is not None:
            raise PEFTError(
                "init_adapter and base_weights were given: an adapter is compared with its base when it is loaded, "
                "which a model without weights is not. Load the adapter in a run of its own, or leave out base_weights."
            )
        self._init_adapter = init_adapter
        # Where the method is left out, the adapter says what it is.
        self._takes_method = init_adapter is not None and method == "lora"

    @property
    def accelerator(self) -> Accelerator | None:
        """The Trainer's; setting it is the first thing that its connector does.

        Raises:
            PEFTError: The Trainer is of another distribution of Lightning.
        """
        return self._accelerator

    @accelerator.setter
    def accelerator(self, accelerator: Accelerator) -> None:
        refuse_other_lightning(accelerator, "The Trainer")
        self._accelerator = accelerator

    def _become(self, strategy: Strategy) -> None:
        """Turn into an instance of the class for ``strategy`` and take its state over; the object stays the same."""
        self.__class__ = _class_for(type(self), type(strategy))  # type: ignore[assignment]
        self.__dict__.update(vars(strategy))

    def begin(self) -> None:
        """Be what the user made, also if this object has served another Trainer. Called when one is given it.

        Raises:
            PEFTError: Another Trainer is running with it.
        """
        if self._as_made is None:
            self._as_made = self._base_class, _copied(vars(self))
            return
        with suppress(RuntimeError):  # no trainer
            if self.lightning_module and self.lightning_module.trainer.state.status == TrainerStatus.RUNNING:
                raise PEFTError(
                    "This PEFTStrategy was given to another Trainer, which is running. Make one for each: "
                    "Trainer(strategy=PEFTStrategy(...))."
                )
        base, made = as_made = self._as_made
        self.__class__ = _kind(self._own_class or type(self), base)  # type: ignore[assignment]
        vars(self).clear()
        vars(self).update(_copied(made), _as_made=as_made)

    def _configure_launcher(self) -> None:
        # The last call of the Trainer's connector, and the first moment at which the devices are known.
        if self._base_class is None:
            self._choose_base()
        super()._configure_launcher()
        if isinstance(self._launcher, _MultiProcessingLauncher):
            self._launcher = PEFTMultiProcessingLauncher(self, self._launcher._start_method)  # type: ignore[arg-type]

    def _choose_base(self) -> None:
        """Become what serves the Trainer's devices, and hand on what its connector has set."""
        given = dict(self.__dict__)
        strategy = choose_strategy(self._base_name, self.accelerator, given["parallel_devices"], given["num_nodes"])
        self._become(strategy)
        for key in ("accelerator", "precision_plugin", "cluster_environment", "parallel_devices", "num_nodes"):
            if hasattr(type(strategy), key) or key in vars(strategy) or f"_{key}" in vars(strategy):
                setattr(self, key, given.get(f"_{key}", given.get(key)))
        self._checkpoint_io = given["_checkpoint_io"]

    def __reduce__(self) -> Any:
        # The class is made at run time, so pickle cannot find it by name; spawned workers make it from its base.
        return _rebuild, (self._own_class or type(self), self._base_class), self.__getstate__()


# jsonargparse instantiates only classes without abstract methods. Those of this class are the base strategy's.
PEFTStrategy.__abstractmethods__ = frozenset()


def _checked(base: Strategy | str) -> Strategy:
    refuse_other_lightning(base, f"base={type(base).__name__}(…)")
    strategy = strategy_from_name(base) if isinstance(base, str) else base
    if not isinstance(strategy, Strategy) or isinstance(strategy, PEFTStrategy):
        raise PEFTError(
            f"base={base!r} was given; it is 'auto', the name of a Lightning strategy or a configured one other "
            f"than PEFTStrategy. Names: {', '.join(base_names())}."
        )
    return strategy


def _copied(value: Any) -> Any:
    """Return ``value`` with copies of the dictionaries and lists in it, which a run may write to."""
    if type(value) is dict:
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if type(value) is list else value


@cache
def _class_for(own: type[PEFTStrategy], base: type[Strategy]) -> type[PEFTStrategy]:
    content = {"__module__": __name__, "__doc__": own.__doc__, "_own_class": own, "_base_class": base}
    return type(f"PEFT{base.__name__}", (*behaviour(base), own, base), content)


def _kind(own: type[PEFTStrategy], base: type[Strategy] | None) -> type[PEFTStrategy]:
    return own if base is None else _class_for(own, base)


def _rebuild(own: type[PEFTStrategy], base: type[Strategy] | None) -> PEFTStrategy:
    return object.__new__(_kind(own, base))
