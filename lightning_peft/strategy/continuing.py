"""A resumed run draws the random numbers that the run would have drawn next which wrote the checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.distributed import all_gather_object
from torch.utils.data import IterableDataset

from lightning_peft.errors import PEFTError
from lightning_peft.files.likeness import refuse_unlike
from lightning_peft.strategy.leaving import Leaving
from lightning_peft.tensors.randomness import generator_states, set_generator_states

_STATES, _EPOCH_ENDED, _OF_LOADERS = "states", "epoch_ended", "loaders"


class Continuing(Leaving):
    """Saves the states of random generators with a checkpoint, and puts generators back into them on resume."""

    _generators: Mapping[str, Any] | None = None
    """What the checkpoint says of them from which this run is about to go on."""

    def connect(self, model: pl.LightningModule) -> None:
        """Attach the module, for a run that has read no checkpoint yet."""
        super().connect(model)
        self._generators = None

    def _note_generators(self) -> dict[str, Any] | None:
        """Return what a checkpoint is to hold of the generators of all processes; nothing, before a run has begun."""
        if (trainer := self._attached_to) is None:
            return None
        of_loaders = [generator.get_state() for generator in _generators_of(trainer)]
        states = [{**generator_states(self.root_device), _OF_LOADERS: of_loaders}] * trainer.world_size
        if trainer.world_size > 1:
            all_gather_object(states, states[0])
        return {_STATES: states, _EPOCH_ENDED: trainer.is_last_batch}

    def _continue_from(self, saved: Mapping[str, Any] | None) -> None:
        """Go on from what :meth:`_note_generators` returned, if training is about to begin and as many processes do."""
        trainer = self._attached_to
        if saved is None or trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return
        states = saved.get(_STATES) if isinstance(saved, Mapping) else None
        if not isinstance(states, list) or not all(isinstance(each, Mapping) for each in states):
            raise PEFTError("The checkpoint's states of random generators are damaged. Take another checkpoint.")
        found = [saved.get(_EPOCH_ENDED, False), *(each.get(_OF_LOADERS, []) for each in states)]
        refuse_unlike(found, [False, *([] for _ in states)], "random generators", whole=True)
        if (written := len(states)) == trainer.world_size:
            self._generators = saved
        else:
            rank_zero_warn(
                f"The checkpoint was written by {written} processes, and this run has {trainer.world_size}: random "
                "numbers (dropout, shuffling) are not those that would have come next."
            )

    def _refuse_damaged(self, checkpoint: Mapping[str, Any]) -> None:
        """Check what Lightning will take of a checkpoint for its loops and callbacks, if training is about to begin.

        Raises:
            PEFTError: It is not what loops and callbacks have here.
        """
        trainer = self._attached_to
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return
        version = checkpoint.get("pytorch-lightning_version")
        if not isinstance(version, str) or not re.match(r"\d+(\.\d+)*\w*", version):
            raise PEFTError(f"The checkpoint was written by Lightning {version!r}, which is no release. Take another.")
        saved, loops = checkpoint.get("loops", {}), trainer.fit_loop.state_dict()
        refuse_unlike(saved, {"fit_loop": loops}, "the loops")
        # Of another release's loops Lightning sees to itself; what loops keep in a state_dict may be somebody else's.
        known = {key: value for key, value in loops.items() if not key.endswith("state_dict")}
        refuse_unlike(saved, {"fit_loop": known}, "the loops", whole=version == pl.__version__)
        states = checkpoint.get("callbacks", {})
        refuse_unlike(states, {}, "the callbacks")
        for callback in trainer.callbacks if states else ():  # type: ignore[attr-defined]
            # Others may change what they keep, and have no state before the run begins.
            if callback.state_key in states and type(callback).__module__.startswith(("lightning.", "lightning_peft.")):
                state, name = callback.state_dict(), type(callback).__name__
                refuse_unlike(states[callback.state_key], state, name)
                refuse_unlike(states[callback.state_key], dict.fromkeys(state), name, whole=version == pl.__version__)

    @property
    def _attached_to(self) -> pl.Trainer | None:
        """The trainer of the module, if there are both."""
        with suppress(RuntimeError):
            return None if self.lightning_module is None else self.lightning_module.trainer
        return None

    def on_train_start(self) -> None:
        """Put the generators back: nothing is drawn between this and the next step but what that step draws."""
        super().on_train_start()
        self._load_states_of_loaders()
        saved, self._generators = self._generators, None
        if saved is None:
            return
        trainer, loop = self._module.trainer, self._module.trainer.fit_loop
        self._tell_what_is_inexact()
        states = saved[_STATES][trainer.global_rank]
        set_generator_states(states, self.root_device)
        if saved.get(_EPOCH_ENDED):
            self._set_generators_of_loaders(states.get(_OF_LOADERS, ()))
        if saved.get(_EPOCH_ENDED) and (not loop.epoch_loop.restarting or loop.epoch_loop.restarted_on_train_batch_end):
            # Lightning has begun to iterate over the next epoch, with what a new process draws and samplers of another
            # epoch. In all other cases it ends the last epoch first, and will begin when that has been done.
            assert loop._combined_loader is not None
            loaders = loop._combined_loader.flattened
            if any(isinstance(getattr(loader, "dataset", None), IterableDataset) for loader in loaders):
                return  # which may have handed out by now what it has only once
            for loader in loaders:
                _set_sampler_epoch(loader, trainer.current_epoch)
            iter(loop._data_fetcher)  # type: ignore[arg-type]

    def _set_generators_of_loaders(self, states: Any) -> None:
        generators = _generators_of(self._module.trainer)
        if len(generators) != len(states):
            if states:  # which an older release has not written
                rank_zero_warn(
                    f"The checkpoint has states of {len(states)} generators of loaders, and the loaders of this run "
                    f"have {len(generators)}: they draw from their beginning."
                )
            return
        for generator, state in zip(generators, states, strict=True):
            try:
                generator.set_state(state)
            except (TypeError, RuntimeError) as error:
                raise PEFTError(
                    f"The checkpoint's states of loaders' generators are damaged: {error}. Take another checkpoint."
                ) from error

    def _tell_what_is_inexact(self) -> None:
        """Say which loaders of the resumed run may not hand out what would have come next."""
        trainer = self._module.trainer
        if (every := trainer.reload_dataloaders_every_n_epochs) and _generators_of(trainer):  # type: ignore[attr-defined]
            # Lightning asks a loader for its batches twice where it makes it anew, and once in a run that is resumed.
            rank_zero_warn(
                f"Loaders are made anew every {every} epochs (reload_dataloaders_every_n_epochs): a generator that "
                "train_dataloader makes with its loader may draw other numbers than in the run without a break. One "
                "that the module keeps goes on where it was."
            )
        loader = trainer.fit_loop._combined_loader
        plain = [] if loader is None else [each for each in loader.flattened if not hasattr(each, "load_state_dict")]
        found = {
            "An IterableDataset begins anew, and may draw": any(
                isinstance(getattr(each, "dataset", None), IterableDataset) for each in plain
            ),
            "Workers that persist draw": any(getattr(each, "persistent_workers", False) for each in plain),
        }
        for what in [what for what, there in found.items() if there]:
            rank_zero_warn(
                f"{what} other random numbers than in the run without a break: the resumed run need not equal it. "
                "A loader with state_dict and load_state_dict, such as torchdata's StatefulDataLoader, goes on where "
                "it was."
            )

    def _load_states_of_loaders(self) -> None:
        """Load the states of loaders that Lightning has made before it read the checkpoint, and then passes over.

        It makes them early where ``configure_optimizers`` asks for the number of steps.
        """
        trainer, loop = self._module.trainer, self._module.trainer.fit_loop
        if loop._combined_loader is None or not loop._combined_loader_states_to_load:
            return
        loop._load_combined_loader_states()
        for loader in loop._combined_loader.flattened:
            _set_sampler_epoch(loader, trainer.current_epoch)
        iter(loop._data_fetcher)  # type: ignore[arg-type]


def _generators_of(trainer: pl.Trainer) -> list[torch.Generator]:
    """Return the generators that training's loaders were given to draw from, in a fixed order, each once."""
    combined = trainer.fit_loop._combined_loader
    found: dict[int, torch.Generator] = {}
    for loader in () if combined is None else combined.flattened:
        sampler, batches = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
        for holder in (loader, sampler, batches, getattr(batches, "sampler", None)):
            if isinstance(generator := getattr(holder, "generator", None), torch.Generator):
                found[id(generator)] = generator
    return list(found.values())
