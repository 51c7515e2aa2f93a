"""PEFTStrategy: one flag that turns a Lightning run into a parameter-efficient one.

The class is also the first base of a class made for each Lightning strategy (``PEFTDDPStrategy`` and so on), so that
Lightning's own ``isinstance`` checks keep their meaning. The methods stand in the order in which a run calls them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cache
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import Strategy, StrategyRegistry
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_peft.core.method import PEFTMethod, methods_of, registered_methods
from lightning_peft.core.registry import registries
from lightning_peft.core.sharding import full_shape, map_tensors, whole
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.formats.distributed import split_values
from lightning_peft.operations.inject import inject
from lightning_peft.operations.merge import is_merged, merge, unmerge
from lightning_peft.storage import checkpoint as files
from lightning_peft.storage.base_weights import Gathered, load_base_weights
from lightning_peft.storage.state import adapter_parameters_and_whole, adapter_state_dict
from lightning_peft.strategy.bases import PREFIX, base_names, behaviour, strategy_from_name
from lightning_peft.strategy.bases.auto import AUTO, SINGLE_DEVICE, choose_strategy
from lightning_peft.strategy.bases.spawn import PEFTMultiProcessingLauncher
from lightning_peft.strategy.optim import restrict_to_trainable, state_by_name, state_by_position
from lightning_peft.strategy.schedule import after_step, before_step, changes_gradients, has_schedule, known_steps
from lightning_peft.targets.inner_models import transformers_models

# Beyond it a merge is reported as a warning. bfloat16 weights lose 3 to 20 % of a typical adapter.
_MERGE_LOSS_WARNING = 0.01


class PEFTStrategy(Strategy):
    """Fine-tune adapters instead of the model, on top of any Lightning strategy.

    At ``setup`` the adapters are injected; optimizers are restricted to what is trained; every checkpoint holds adapter
    state only; after training the adapters are merged into the weights.

    Args:
        method: What to train: a method such as ``LoRA(r=8)``, its registered name, or a list of several that make one
            adapter together.
        base: The strategy underneath: ``"auto"``, a registered name such as ``"ddp"``, or a configured strategy.
        merge_on_train_end: Merge the adapters into the weights when training has ended. The adapters and a copy of the
            adapted weights in host memory are kept, so that ``unmerge``, ``test(ckpt_path="best")`` and another ``fit``
            work.
        checkpoint: ``"adapter"`` writes adapter state only, ``"full"`` the frozen weights as well.
        train_also: Patterns of modules to train whole and to save with the adapter, such as a classification head.
        train_mode: Put transformers models, which arrive in eval mode, into train mode when fit starts: in eval mode
            their dropout is off and gradient checkpointing does nothing.
        base_weights: A directory of safetensors that ``save_pretrained`` wrote, for a model that was built without
            weights (``trainer.init_module(empty_init=True)`` in ``configure_model``): they are loaded at ``setup``, one
            tensor at a time and by each process its own part.
    """

    _base_class: ClassVar[type[Strategy] | None] = None
    _takes_sharded: ClassVar[bool] = False
    """Whether adapters of a model that is sharded already are kept equal between processes."""
    _gathered: Gathered = staticmethod(nullcontext)  # type: ignore[assignment]
    """Called with a module, makes a context in which its parameters are whole."""

    def __new__(
        cls,
        method: PEFTMethod | str | list[PEFTMethod | str] = "lora",
        base: Strategy | str = "auto",
        *,
        merge_on_train_end: bool = True,
        checkpoint: Literal["adapter", "full"] = "adapter",
        train_also: list[str] | str | None = None,
        train_mode: bool = True,
        base_weights: str | None = None,
    ) -> PEFTStrategy:
        """Make an instance of the class for ``base``. The signature is ``__init__``'s: jsonargparse reads this one."""
        if base in (AUTO, SINGLE_DEVICE):
            placeholder: PEFTStrategy = object.__new__(PEFTStrategy)  # type: ignore[type-abstract]
            Strategy.__init__(placeholder)
            # What the Trainer's connector sets if it is there; `_configure_launcher` hands it on.
            placeholder.__dict__.update(cluster_environment=None, parallel_devices=None, num_nodes=1, _layer_sync=None)
            return placeholder
        strategy = strategy_from_name(base) if isinstance(base, str) else base
        if not isinstance(strategy, Strategy) or isinstance(strategy, PEFTStrategy):
            raise PEFTError(
                f"base={base!r} was given; it is 'auto', the name of a Lightning strategy or a configured one other "
                f"than PEFTStrategy. Names: {', '.join(base_names())}."
            )
        self = object.__new__(_class_for(type(strategy)))
        self.__dict__.update(copy.copy(strategy).__dict__)
        return self

    def __init__(
        self,
        method: PEFTMethod | str | list[PEFTMethod | str] = "lora",
        base: Strategy | str = "auto",
        *,
        merge_on_train_end: bool = True,
        checkpoint: Literal["adapter", "full"] = "adapter",
        train_also: list[str] | str | None = None,
        train_mode: bool = True,
        base_weights: str | None = None,
    ) -> None:
        # `__new__` has taken over the state of `base`: its own __init__ must not run again.
        self.methods = methods_of(method)
        self._base_name = base if isinstance(base, str) else type(base).__name__
        if checkpoint not in ("adapter", "full"):
            raise PEFTError(f"checkpoint={checkpoint!r} was given; it is 'adapter' or 'full'.")
        self._full_checkpoints = checkpoint == "full"
        self._merge_on_train_end = merge_on_train_end
        self._train_also = [train_also] if isinstance(train_also, str) else list(train_also or ())
        self._train_mode = train_mode
        self._base_weights = base_weights
        self._is_set_up = False
        self._held_back: tuple[Mapping[str, Any], bool] | None = None
        self._total_steps: int | None = None
        self._stepped: set[int] = set()

    def __reduce__(self) -> Any:
        # The class is made at run time, so pickle cannot find it by name; spawned workers get it from its base.
        return _rebuild, (self._base_class,), self.__getstate__()

    def _configure_launcher(self) -> None:
        # The last call of the Trainer's connector, and the first moment at which the devices are known.
        if type(self) is PEFTStrategy:
            devices, num_nodes = self.__dict__["parallel_devices"], self.__dict__["num_nodes"]
            self._become(choose_strategy(self._base_name, self.accelerator, devices, num_nodes))
        super()._configure_launcher()
        if isinstance(self._launcher, _MultiProcessingLauncher):
            self._launcher = PEFTMultiProcessingLauncher(self, self._launcher._start_method)  # type: ignore[arg-type]

    def _become(self, strategy: Strategy) -> None:
        """Turn this placeholder into an instance of the class for ``strategy``; the Trainer keeps the object."""
        known = dict(self.__dict__)
        self.__class__ = _class_for(type(strategy))  # type: ignore[assignment]
        self.__dict__.update(strategy.__dict__)
        for key in ("accelerator", "precision_plugin", "cluster_environment", "parallel_devices", "num_nodes"):
            value = known.get(f"_{key}", known.get(key))
            if hasattr(type(strategy), key) or key in strategy.__dict__ or f"_{key}" in strategy.__dict__:
                setattr(self, key, value)
        self.__dict__["_checkpoint_io"] = known["_checkpoint_io"]

    def connect(self, model: pl.LightningModule) -> None:
        """Attach the module, and this run's summary to the trainer's callbacks."""
        # Imported here: callbacks are written on top of this strategy.
        from lightning_peft.callbacks.summary import PEFTSummary

        super().connect(model)
        self._is_set_up, self._held_back = False, None
        callbacks = model.trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, PEFTSummary) for callback in callbacks):
            callbacks.insert(0, PEFTSummary())

    def inject(self) -> None:
        """Inject the adapters into the connected module; does nothing if it has some already.

        Called at ``setup``. A module that shards its parameters in ``configure_model`` calls it there first, as
        ``self.trainer.strategy.inject()``.

        Raises:
            PEFTError: The method does not fit the model, or the model has adapters of another method.
        """
        self._inject()

    def _inject(self) -> None:
        """Do so, on both ways: :meth:`inject` is what the module calls, ``setup`` comes here. Bases extend either."""
        module = self._module
        present = [methods for _, _, registry in registries(ModelView(module)) for methods in registry.methods.values()]
        for methods in present:
            theirs, ours = ([type(method) for method in found] for found in (methods, self.methods))
            if theirs != ours:
                names = [" + ".join(method.__name__ for method in found) for found in (theirs, ours)]
                raise PEFTError(
                    f"The model already has adapters of method {names[0]}, the strategy was given {names[1]}. Give "
                    "both the same method, or call eject(model) first."
                )
        if (
            present
            and self._train_also
            and not any(registry.train_also for _, _, registry in registries(ModelView(module)))
        ):
            raise PEFTError(
                f"The model already has adapters, so train_also={self._train_also!r} would have no effect. Pass it to "
                "inject, or leave the injection to the strategy."
            )
        if not present and self._base_weights and (reading := [m for m in self.methods if m.reads_weights]):
            raise PEFTError(
                f"{type(reading[0]).__name__} starts from the model's weights, but base_weights are loaded after the "
                "injection. Load them in configure_model with load_base_weights, or start at random."
            )
        if not present:
            # One seed for all ranks: without it each would start from other values where nothing broadcasts them.
            seed = self.broadcast(torch.initial_seed())
            inject(module, self.methods, train_also=self._train_also, seed=seed, allow_sharded=self._takes_sharded)

    def inject_in_main_process(self) -> None:
        """Inject where no ``setup`` ran: the process that spawned the workers."""
        if is_overridden("configure_model", self._module) and not registries(ModelView(self._module)):
            rank_zero_warn(
                "The model was built by configure_model in the worker processes, so this process has no model to load "
                "the trained adapters into. Use load_adapter(model, path) with a checkpoint."
            )
            return
        self.inject()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint file, or a directory written by ``AdapterCheckpoint``."""
        if files.is_directory(checkpoint_path):
            return files.read_directory(checkpoint_path, weights_only)
        return super().load_checkpoint(checkpoint_path, weights_only)

    def _load_base_weights(self) -> None:
        """Load the frozen weights, if they are to come from files."""
        # Merged weights hold what the adapters learnt.
        if self._base_weights is not None and not is_merged(self._module):
            load_base_weights(self._module, self._base_weights, gathered=self._gathered)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load adapter state; strict about adapters whatever ``strict`` says.

        On one device and under DDP, Lightning calls this before ``setup``, when there are no adapters yet: the state is
        held back until they are injected.

        Raises:
            PEFTError: The checkpoint has no adapters, other ones, or those of another base model.
        """
        if not self._is_set_up:
            # Fail before the model is moved and optimizers are made.
            files.checkpoint_metadata(checkpoint)
            self._held_back = (dict(checkpoint), strict)
            return
        unmerge(self._module)
        files.apply(checkpoint, ModelView(self._module), strict, self._gathered)

    def setup(self, trainer: pl.Trainer) -> None:
        """Set the base strategy up, with the adapters injected on the way.

        That is right after ``convert_module``, the one call that every base strategy makes: a quantising plugin
        replaces linear layers there, adapters' included, and wrapping and optimizers come later.
        """
        _refuse_averaging(trainer)
        self.precision_plugin = plugin = self.precision_plugin
        convert = plugin.convert_module

        def convert_and_inject(module: nn.Module) -> nn.Module:
            converted: nn.Module = convert(module)
            self._prepare(trainer)
            return converted

        plugin.convert_module = convert_and_inject  # type: ignore[method-assign]
        try:
            super().setup(trainer)
        finally:
            del plugin.convert_module
        self._refuse_unserved()

    def _refuse_unserved(self) -> None:
        """Check that the base strategy went the way of Lightning's own.

        Raises:
            PEFTError: It is a strategy of the user's that leaves out a call.
        """
        held = [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]
        for missing, call in (
            (not self._is_set_up, "self.precision_plugin.convert_module(self.model)"),
            (any(not p.requires_grad for p in held), "self.setup_optimizers(trainer)"),
        ):
            if missing:
                raise PEFTError(
                    f"The base strategy {self._base_name} does not call {call} in setup, where adapters are injected "
                    "and optimizers restricted. Call it there, or call super().setup(trainer)."
                )

    def _prepare(self, trainer: pl.Trainer) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING
        self._inject()
        self._place_adapters()
        self._refuse_different_ranks()
        if fitting or self._held_back is not None:
            unmerge(self._module)
        self._apply_held_back()
        self._is_set_up = True
        if fitting:
            self._stepped.clear()
            self._set_modes()

    def _apply_held_back(self) -> None:
        """Load what was to be loaded before there were adapters."""
        if self._held_back is not None:
            checkpoint, strict = self._held_back
            files.apply(checkpoint, ModelView(self._module), strict, self._gathered)
            self._held_back = None

    def _place_adapters(self) -> None:
        """Put the adapters where they belong, before the base strategy moves or wraps the module."""
        self._load_base_weights()

    def _refuse_different_ranks(self) -> None:
        """Check that every process trains the same adapters: a collective over different ones would hang or mix them.

        Raises:
            PEFTError: One does not; raised on every process.
        """
        shapes = {
            name: list(full_shape(p)) for name, p in adapter_parameters_and_whole(ModelView(self._module)).items()
        }
        first = self.broadcast(shapes)
        differing = sorted(n for n in first.keys() | shapes.keys() if first.get(n) != shapes.get(n))
        count = self.reduce(torch.tensor(float(bool(differing)), device=self.root_device), reduce_op="sum")
        if count:
            name = next(iter(differing), None)
            where = (
                f"here {name!r} is {shapes.get(name)}, on rank 0 {first.get(name)}" if name else "see the other ranks"
            )
            raise PEFTError(
                f"{int(count)} processes have other adapters than rank 0: {where}. Build the same model on each."
            )

    def _set_modes(self) -> None:
        """Put transformers models in train mode, and frozen batch norms in eval mode."""
        if self._train_mode:
            for model in transformers_models(ModelView(self._module)).values():
                model.train()
        for part in self._module.modules():
            frozen = not any(parameter.requires_grad for parameter in part.parameters())
            if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.track_running_stats and frozen:
                # Running statistics are no adapter state: if they moved, a resumed run would not have them.
                part.eval()

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        """Call ``configure_optimizers`` and restrict what it returned to what is trained."""
        super().setup_optimizers(trainer)
        schedulers = [config.scheduler for config in self.lr_scheduler_configs]
        restrict_to_trainable(self.optimizers, schedulers, self._module)
        if has_schedule(self.methods):
            self._total_steps = steps = known_steps(self.methods, trainer.estimated_stepping_batches)
            if steps is not None and self._is_real_run():
                for method in self.methods:
                    method.check_steps(steps)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load optimizer states, which are saved by parameter name."""
        saved = checkpoint["optimizer_states"]
        if len(saved) != len(self.optimizers):
            raise PEFTError(
                f"The checkpoint has the states of {len(saved)} optimizers, configure_optimizers made "
                f"{len(self.optimizers)}. Make those that it was saved with."
            )
        states = [state_by_position(o, s, self._module) for o, s in zip(self.optimizers, saved, strict=True)]
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": states})

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Step, and after the first one name the adapters that got no gradient."""

        def closure_and_more() -> Any:
            result = closure()
            scaler = getattr(self.precision_plugin, "scaler", None)
            before_step(self._module, 1.0 if scaler is None else scaler.get_scale())
            return result

        scheduled = closure_and_more if changes_gradients(self.methods) else closure
        output = super().optimizer_step(optimizer, scheduled, model, **kwargs)
        if id(optimizer) not in self._stepped:
            self._stepped.add(id(optimizer))
            self._warn_without_gradient(optimizer)
        if has_schedule(self.methods):
            # Lightning counts this step when it has returned.
            after_step(self._module, self._module.trainer.global_step + 1, self._total_steps)
        return output

    def _warn_without_gradient(self, optimizer: Optimizer) -> None:
        held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
        names = {name: p for name, p in ModelView(self._module).adapter_parameters.items() if id(p) in held}
        idle = [name for name, parameter in names.items() if parameter.grad is None]
        if idle and len(idle) < len(names):
            rank_zero_warn(
                f"{len(idle)} adapter parameters got no gradient in the first step, so their modules were not called: "
                f"{', '.join(idle[:5])}. If they never are, leave them out with exclude_modules."
            )

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return adapter state, or everything with ``checkpoint="full"``; a merge is not seen in either."""
        if self._full_checkpoints:
            # Where the base strategy gathers a model, it does so for one process only.
            state = {**super().lightning_module_state_dict(), **adapter_state_dict(self._module)}
            return files.unmerged_state_dict(state, ModelView(self._module))
        return dict(adapter_state_dict(self._module))

    @property
    def _saves_shards(self) -> bool:
        """Whether the base strategy writes every process's pieces of a checkpoint into one directory."""
        return False

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the optimizer's state by parameter name."""
        return state_by_name(optimizer, super().optimizer_state(optimizer), self._module)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint file, or a directory if ``storage_options`` is an ``AdapterDirectory``."""
        files.finish(checkpoint, ModelView(self._module), self._full_checkpoints)
        directory = isinstance(storage_options, files.AdapterDirectory)
        if directory or not self._saves_shards:
            checkpoint = map_tensors(checkpoint, whole)
        else:
            split_values(checkpoint)
        if not directory:
            super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)
        elif self.is_global_zero:
            files.write_directory(checkpoint, filepath, ModelView(self._module))

    def on_train_end(self) -> None:
        """Merge. Lightning calls this last, after every checkpoint has been written."""
        super().on_train_end()
        if self._merge_on_train_end and self._is_real_run() and not is_merged(self._module):
            report = merge(self._module, gathered=self._gathered)
            (rank_zero_warn if report.largest_loss > _MERGE_LOSS_WARNING else rank_zero_info)(str(report))

    def _is_real_run(self) -> bool:
        # The learning-rate finder and the batch-size scaler run short fits of their own, for which they put other
        # callbacks in place of the trainer's.
        from lightning_peft.callbacks.summary import PEFTSummary

        trainer = self._module.trainer
        return not trainer.fast_dev_run and any(isinstance(c, PEFTSummary) for c in trainer.callbacks)  # type: ignore[attr-defined]

    @property
    def _module(self) -> pl.LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module


# jsonargparse instantiates only classes without abstract methods. Those of this class are the base strategy's.
PEFTStrategy.__abstractmethods__ = frozenset()


def register_strategies() -> None:
    """Register ``peft``, ``peft_<method>`` and ``peft_<method>_<base>`` with Lightning."""
    names = {PREFIX: ("lora", "auto")}
    for method in registered_methods():
        names[f"{PREFIX}_{method}"] = (method, "auto")
        names.update({f"{PREFIX}_{method}_{base}": (method, base) for base in base_names()[1:]})
    for name, (method, base) in names.items():
        StrategyRegistry.register(
            name, PEFTStrategy, description=f"{method} on {base}", override=True, method=method, base=base
        )


@cache
def _class_for(base: type[Strategy]) -> type[PEFTStrategy]:
    above, below = behaviour(base)
    content = {"__module__": __name__, "__doc__": PEFTStrategy.__doc__, "_base_class": base}
    return type(f"PEFT{base.__name__}", (*above, PEFTStrategy, *below, base), content)


def _rebuild(base: type[Strategy] | None) -> PEFTStrategy:
    return object.__new__(PEFTStrategy if base is None else _class_for(base))  # type: ignore[type-abstract]


def _refuse_averaging(trainer: pl.Trainer) -> None:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            raise PEFTError(
                f"{type(callback).__name__} copies the model before adapters are injected and would average the frozen "
                "weights. Leave it out of the callbacks."
            )
