"""The lifecycle of a run, in the order in which a run calls it: from ``connect`` to ``on_train_end``.

In the order of classes :class:`Lifecycle` stands above a Lightning strategy, which ``super()`` is, and below
:class:`~lightning_peft.strategy.strategy.PEFTStrategy`, which chooses that one. What differs by base is in ``bases``.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_peft.callbacks.averaging import average_what_is_trained
from lightning_peft.callbacks.summary import PEFTSummary
from lightning_peft.core.registry import own_registry, registries, remember_buffers, was_unloaded
from lightning_peft.core.view import ModelView
from lightning_peft.operations.inject import inject
from lightning_peft.operations.merge import is_merged, unmerge
from lightning_peft.operations.rest import freeze_rest
from lightning_peft.operations.shards import resharded
from lightning_peft.storage import checkpoint as files
from lightning_peft.storage import plain
from lightning_peft.storage.after_hooks import follow
from lightning_peft.storage.base_weights import load_base_weights
from lightning_peft.storage.saving import check_writable
from lightning_peft.storage.state import adapter_state
from lightning_peft.strategy import refusals
from lightning_peft.strategy.checkpoints import Checkpoints
from lightning_peft.strategy.restore import load_start
from lightning_peft.strategy.untrained import own_train_also, unloaded, untrained
from lightning_peft.structure.inner_models import transformers_models


class Lifecycle(Checkpoints):
    """What becomes of a model and its adapters in a run."""

    _base_name: str
    _train_also: list[str] | None
    _configs_whole: list[str]
    _asked: list[bool]
    _train_mode: bool
    _base_weights: str | None
    _init_adapter: str | os.PathLike[str] | None
    _takes_method: bool

    _base_class: ClassVar[type[Strategy] | None] = None
    _takes_sharded: ClassVar[bool] = False
    """Whether adapters of a model that is sharded already are kept equal between processes."""

    _is_set_up = False
    _held_back: tuple[Mapping[str, Any], bool] | None = None
    """A checkpoint that was to be loaded before there were adapters, and whether strictly."""

    @abstractmethod
    def __init__(self) -> None:
        """Set the options above. It is abstract, so that no class below ``PEFTStrategy`` is offered to a user."""

    def connect(self, model: pl.LightningModule) -> None:
        """Attach the module; a trainer need not be there yet."""
        super().connect(model)
        self._is_set_up, self._held_back = False, None

    def setup_environment(self) -> None:
        """Set processes up. All callbacks are known by now, and none has been set up."""
        super().setup_environment()
        average_what_is_trained(self._module.trainer.callbacks, self)  # type: ignore[attr-defined]

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
        view = ModelView(self._module)
        if self._init_adapter is not None and not registries(view):
            view = self._begin_with(self._init_adapter)
        elif self._held_back is not None and not registries(view):
            view = self._inject_where_it_was(self._held_back[0])
        if registries(view):
            refusals.refuse_other_methods(view, self.methods, self._asked)
            self._inject_around(view)
            return
        if self._base_weights:
            refusals.refuse_reading_late_weights(self.methods)
        # One seed for all ranks: without it each would start from other values where nothing broadcasts them.
        seed = self.broadcast(torch.initial_seed())
        inject(self._module, self.methods, train_also=self._whole(), seed=seed, allow_sharded=self._takes_sharded)
        self._note_built()

    def _begin_with(self, path: str | os.PathLike[str]) -> ModelView:
        """Inject an adapter from a file, with its values."""
        load_start(self._module, path)
        view = ModelView(self._module)
        if self._takes_method:
            found = (methods for _, _, registry in registries(view) for methods in registry.methods.values())
            self.methods = next(found)
            self._asked = [False] * len(self.methods)
        return view

    def _inject_where_it_was(self, checkpoint: Mapping[str, Any]) -> ModelView:
        """Inject into parts of the module, if it is these that a run had adapters in which is gone on with.

        They had been loaded from a file or injected by hand before that run.
        """
        if files.has_parts(checkpoint):
            files.inject_from(checkpoint, self._module)
        return ModelView(self._module)

    def _inject_around(self, view: ModelView) -> None:
        """Do what an injection does beside adapters, where a model or a part of it has some already."""
        if own_registry(self._module) is not None:
            refusals.refuse_late_train_also(view, [*(self._train_also or ()), *self._configs_whole])
        elif frozen := freeze_rest(self._module, self._whole()):
            rank_zero_warn(
                f"Parts of this {view.kind} have adapters already, so the rest gets none and is frozen: {frozen[0]!r} "
                f"and {len(frozen) - 1} other parameters. Name in train_also what of it is to be trained."
            )
        self._note_built()

    def _whole(self) -> list[str]:
        return [*own_train_also(self._module, self._train_also), *self._configs_whole]

    def _load_base_weights(self) -> None:
        """Load the frozen weights, if they are to come from files."""
        # Merged weights hold what the adapters learnt.
        merged = is_merged(self._module) or was_unloaded(ModelView(self._module))
        if self._base_weights is not None and not merged:
            load_base_weights(self._module, self._base_weights)
            remember_buffers(ModelView(self._module), again=True)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load adapter state; strict about adapters whatever ``strict`` says.

        On one device and under DDP, Lightning calls this before ``setup``, when there are no adapters yet: the state is
        held back until they are injected.

        Raises:
            PEFTError: The checkpoint has no adapters, other ones, or those of another base model.
        """
        assert isinstance(checkpoint, dict)
        read, self._read = self._read, None
        if read is not None:
            follow(checkpoint, read)
        if not self._is_set_up:
            # Fail before the model is moved and optimizers are made.
            files.checkpoint_metadata(checkpoint)
            self._held_back = (dict(checkpoint), strict)
            return
        unmerge(self._module)
        self._apply(checkpoint, strict)
        if self._frozen is not None:
            self._look()

    def setup(self, trainer: pl.Trainer) -> None:
        """Set the base strategy up, with the adapters injected on the way, and add the run's summary to the callbacks.

        Adapters are injected right after ``convert_module``, the one call that every base strategy makes: a quantising
        plugin replaces linear layers there, adapters' included, and wrapping and optimizers come later.
        """
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, PEFTSummary) for callback in callbacks):
            callbacks.insert(0, PEFTSummary())
        restores = self._held_back is not None
        self.precision_plugin = plugin = self.precision_plugin
        convert = plugin.convert_module

        def convert_and_inject(module: nn.Module) -> nn.Module:
            converted: nn.Module = convert(module)
            self._prepare(trainer)
            return converted

        if self._has_whole_weights:
            refusals.refuse_without_values(self._without_values(), self._base_name)
        # Where a checkpoint is loaded, it has the weights, or is refused because the base differs.
        empty = set() if self._base_weights or trainer.ckpt_path else self._without_values()
        plugin.convert_module = convert_and_inject  # type: ignore[method-assign]
        try:
            super().setup(trainer)
        finally:
            del plugin.convert_module
        refusals.refuse_unserved(self, self._module, self._base_name, self._is_set_up)
        if not self._is_plain and (text := unloaded(ModelView(self._module), empty)):
            rank_zero_warn(text)
        if trainer.state.fn == TrainerFn.FITTING:
            self._refuse_unsaved()
        elif restores and self._unloads:
            self._merge()

    def teardown(self) -> None:
        """Tear down; of a module without values, which cannot be moved, the error is told that ended the run."""
        try:
            super().teardown()
        except NotImplementedError:
            if not self._without_values():
                raise

    def _without_values(self) -> set[str]:
        """Return the names of parameters that have no memory yet, and that Lightning will draw values for."""
        return {name for name, parameter in ModelView(self._module).parameters.items() if parameter.is_meta}

    def _prepare(self, trainer: pl.Trainer) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING
        resharded(self._module)  # also for optimizers, which would hold gathered copies
        if self._is_plain:
            if self._held_back is not None:
                files.refuse_other_base(self._held_back[0], ModelView(self._module))
            elif not fitting:
                self._is_set_up = True
                return
        self._inject()
        if fitting:
            self._refuse_leaving_plain()
        self._place_adapters()
        refusals.refuse_different_ranks(self, ModelView(self._module))
        if fitting or self._held_back is not None:
            unmerge(self._module)
        self._apply_held_back()
        self._is_set_up = True
        if fitting:
            # Here every process would fail; in the first save rank 0 alone would.
            check_writable(ModelView(self._module))
            self._stepped, self._ran, self._read_states = set(), set(), set()
            self._slots = [slot for _, _, slot in ModelView(self._module).slots]
            self._set_modes()
            if not self._has_whole_weights and trainer.world_size > 1:
                refusals.tell_of_own_statistics(ModelView(self._module))
            refusals.refuse_freezing(trainer, ModelView(self._module), self._leaves_frozen)
            for text in untrained(ModelView(self._module)):
                rank_zero_warn(text)

    def _apply_held_back(self) -> None:
        """Load what was to be loaded before there were adapters, once the base is what it was without them."""
        remember_buffers(ModelView(self._module))
        if self._held_back is not None:
            self._apply(*self._held_back)
            self._held_back = None

    def _apply(self, checkpoint: Mapping[str, Any], strict: bool) -> None:
        view = resharded(self._module)
        files.apply(checkpoint, view, strict)
        if self._module.trainer.state.fn == TrainerFn.FITTING:
            # The hook in which a module switches may not be called again in the middle of an epoch.
            files.activate(checkpoint, view)

    def _place_adapters(self) -> None:
        """Put the adapters where they belong, before the base strategy moves or wraps the module."""
        self._load_base_weights()

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

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return adapter state, or everything with ``checkpoint="full"``; a merge is not seen in either."""
        if self._is_plain:
            return super().lightning_module_state_dict()
        if not self._is_set_up:
            self.inject()  # a checkpoint is asked for before the run begins: it has what the run begins with
        view = resharded(self._module)
        self._take_stock(view)
        if not self._full_checkpoints:
            return self._adapter_state(view)
        # Where the base strategy gathers a model, it does so for one process only.
        state = {**super().lightning_module_state_dict(), **self._adapter_state(view)}
        return plain.unmerged_state_dict(state, view)

    def _adapter_state(self, view: ModelView) -> dict[str, Any]:
        return adapter_state(view)
