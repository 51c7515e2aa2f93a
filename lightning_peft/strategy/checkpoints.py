"""What a run reads and writes: checkpoints as files, as adapter directories, and in the base strategy's own layout."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.io import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from lightning_peft.callbacks.ending import listen, save_last
from lightning_peft.callbacks.last import WritesDirectories
from lightning_peft.core.view import ModelView
from lightning_peft.errors import NotFiniteError, PEFTError, listed
from lightning_peft.files.leftovers import Claim, clean
from lightning_peft.files.manifest import write_manifest
from lightning_peft.files.remote import is_remote
from lightning_peft.files.writing import atomic_directory, atomic_file, os_errors, remove
from lightning_peft.formats.distributed import split_values
from lightning_peft.storage import checkpoint as files
from lightning_peft.storage import checkpoint_directory as directories
from lightning_peft.storage import plain
from lightning_peft.storage.readable import check_sums, is_whole, objects, reading
from lightning_peft.storage.saving import about
from lightning_peft.strategy.continuing import Continuing
from lightning_peft.tensors.finite import not_finite
from lightning_peft.tensors.sharding import map_tensors, whole

T = TypeVar("T")

_GENERATORS, _GRADIENTS = "generators", "gradients"


class WholeFiles(TorchCheckpointIO):
    """Lightning's files, written so that whatever happens leaves the old one or the new one whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``."""
        if storage_options is not None or is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with atomic_file(path) as file:
            torch.save(checkpoint, file)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove what is at ``path``."""
        if is_remote(path):
            super().remove_checkpoint(path)
        else:
            remove(path)


class Checkpoints(WritesDirectories, Continuing):
    """Reads and writes a run's checkpoints; ``super()`` is the base strategy."""

    _claims: Sequence[Claim] = ()
    """The folders that checkpoints of this run go to."""
    _read: Mapping[str, Any] | None = None
    """The state of the checkpoint that was read, before hooks may have changed it."""

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """What writes files: of Lightning's own, also within another, one that leaves no half of a file."""
        if (around := self._checkpoint_io) is not None and hasattr(around, "checkpoint_io"):
            around.checkpoint_io = WholeFiles()  # which it takes if nothing was put into it
        plugin: CheckpointIO = super().checkpoint_io
        if type(plugin) is TorchCheckpointIO:
            self._checkpoint_io = plugin = WholeFiles()
        return plugin

    @checkpoint_io.setter
    def checkpoint_io(self, plugin: CheckpointIO) -> None:
        self._checkpoint_io = plugin

    def setup(self, trainer: pl.Trainer) -> None:
        """Set up; what a killed run left among the checkpoints of this one goes, and what it moved aside comes back."""
        super().setup(trainer)
        if trainer.state.fn != TrainerFn.FITTING or trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        given = {getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks}
        folders = [Path(folder) for folder in given if folder and not is_remote(folder)]
        self._release()
        for folder in folders:
            with os_errors("write", folder):
                self._claims = [*self._claims, Claim(folder)]
            clean(folder)
        for folder, other in [(f, c.other) for f, c in zip(folders, self._claims, strict=True) if c.other]:
            rank_zero_warn(
                f"Another run writes checkpoints to {folder} ({other}). Both go on, and each may replace what the "
                "other has written. Give every run a dirpath of its own."
            )

    def on_train_start(self) -> None:
        """Begin training, and listen for signals to end it."""
        super().on_train_start()
        if self._module.trainer.world_size == 1:
            listen()

    def on_exception(self, exception: BaseException) -> None:
        """Leave a checkpoint of the step after which the run was told to end."""
        super().on_exception(exception)
        trainer = self._module.trainer
        if isinstance(exception, SIGTERMException) and trainer.world_size == 1:
            save_last(trainer)

    def teardown(self) -> None:
        """Tear down, and let other runs have the folders."""
        super().teardown()
        self._release()

    def _release(self) -> None:
        for claim in self._claims:
            claim.release()
        self._claims = ()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint file, or a directory: of ``AdapterCheckpoint``, or in the base strategy's own layout.

        Pickles in it are run with ``weights_only=False`` alone, wherever the checkpoint comes from.
        """
        if directories.is_directory(checkpoint_path):
            checkpoint = directories.read_directory(checkpoint_path, weights_only, sharded=self._saves_shards)
        else:
            with reading(checkpoint_path):
                check_sums(checkpoint_path)
                checkpoint = super().load_checkpoint(checkpoint_path, weights_only is not False)
        self._note_saved(checkpoint_path, checkpoint)
        if files.KEY in checkpoint:
            files.check_entries(checkpoint)
            self._refuse_damaged(checkpoint)
        ours = checkpoint.get(files.KEY, {})
        self._continue_from(ours.get(_GENERATORS))
        self._go_on_with(ours.get(_GRADIENTS, {}))
        checkpoint = plain.with_adapters(checkpoint)
        self._read = dict(checkpoint.get("state_dict", {}))
        return checkpoint

    @property
    def _saves_shards(self) -> bool:
        """Whether the base strategy writes every process's pieces of a checkpoint into one directory."""
        return False

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint file, or a directory if ``storage_options`` is an ``AdapterDirectory``."""
        directory, view = isinstance(storage_options, directories.AdapterDirectory), ModelView(self._module)
        if self._is_plain:
            if directory:
                plain.refuse_directory()
            return self._write_checkpoint(checkpoint, filepath, storage_options)
        files.finish(checkpoint, view, self._full_checkpoints)
        gradients = self._accumulated() if "optimizer_states" in checkpoint else {}
        unscaled = {} if self._scales() else {f"the gradient of {name!r}": g for name, g in gradients.items()}
        self._refuse_not_finite({**files.trained(checkpoint, view), **unscaled})
        checkpoint[files.KEY][_GRADIENTS] = gradients
        checkpoint[files.KEY][_GENERATORS] = self._note_generators()
        _warn_of_objects(checkpoint)
        if self._unloads:
            plain.leave_plain(checkpoint, view, self._full_checkpoints and not directory)
        if directory or not self._saves_shards:
            checkpoint = map_tensors(checkpoint, whole)
        else:
            split_values(checkpoint)
        if not directory:
            self._write_checkpoint(checkpoint, filepath, storage_options)
        else:
            self._on_rank_zero(lambda: directories.write_directory(checkpoint, filepath, view))
        self._note_saved(filepath, checkpoint)

    def _note_saved(self, path: Any, checkpoint: Mapping[str, Any] | None = None) -> None:
        """Note that what is at ``path`` now is ``checkpoint``, or that nothing is there any more."""
        resumable = checkpoint is not None and "optimizer_states" in checkpoint
        self._saved = [*(known for known in self._saved if known != str(path)), *([str(path)] if resumable else [])]

    def _is_readable(self, saved: str) -> bool:
        return is_remote(saved) or is_whole(Path(saved))

    def _refuse_not_finite(self, tensors: Mapping[str, Tensor]) -> None:
        """Check that a run can go on from ``tensors``, before they take the place of those from which it can.

        Raises:
            NotFiniteError: One of them holds NaN or infinity on some process.
        """
        found = not_finite(tensors)
        if self.reduce(torch.tensor(float(bool(found)), device=self.root_device), reduce_op="sum"):
            raise NotFiniteError(
                f"{found[0] if found else 'A tensor on another process'} holds NaN or infinity: the run has diverged. "
                "No run could go on from such a checkpoint, so it was not written, and earlier ones stay."
            )

    def _together(self, write: Callable[[], T]) -> T:
        """Call ``write`` on every process and return what it does; where it fails on one, it fails on all.

        Raises:
            PEFTError: It failed: none waits for one that has gone. A process that is alone raises what it met.
        """
        error: Exception | None = None
        try:
            written = write()
        except Exception as caught:
            error = caught
        messages: list[str | None] = [None if error is None else str(error)]
        if dist.is_initialized():
            messages *= dist.get_world_size()
            dist.all_gather_object(messages, messages[0])
        if error is not None and (isinstance(error, PEFTError) or len(messages) == 1):
            raise error
        if failed := [(rank, message) for rank, message in enumerate(messages) if message is not None]:
            raise PEFTError("Rank {} failed: {}".format(*failed[0])) from error
        return written

    def _on_rank_zero(self, write: Callable[[], T]) -> T | None:
        """Call ``write`` there and return what it does, as :meth:`_together` does.

        Raises:
            PEFTError: It failed.
        """
        return self._together(lambda: write() if self.is_global_zero else None)

    def _write_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None) -> None:
        """Write a checkpoint as the base strategy does."""
        write = super().save_checkpoint
        if not self._saves_shards or is_remote(filepath):
            self._together(lambda: write(checkpoint, filepath, storage_options=storage_options))
        else:
            self._write_pieces(filepath, checkpoint, lambda d: write(checkpoint, d, storage_options=storage_options))

    def _write_pieces(self, filepath: Any, checkpoint: Mapping[str, Any], write: Callable[[Path], None]) -> None:
        """Have every process ``write`` its pieces of ``checkpoint`` into what becomes the directory ``filepath``."""
        with ExitStack() as stack:
            staging = self._on_rank_zero(lambda: stack.enter_context(atomic_directory(filepath)))
            directory = Path(self.broadcast(staging))  # type: ignore[arg-type]

            def write_here() -> None:
                try:
                    with os_errors("write", Path(filepath)):
                        write(directory)
                except CheckpointException as error:  # which is no Exception; all processes get it
                    rank, (cause, _) = next(iter(error.failures.items()))
                    raise PEFTError(
                        f"Cannot write {filepath}: rank {rank} failed: {cause}. There is no half of it. Check the "
                        "path, its permissions and the free space."
                    ) from error

            self._together(write_here)
            self._on_rank_zero(lambda: write_manifest(directory, about(ModelView(self._module), checkpoint)))

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove a checkpoint; plugins that write files know nothing of directories."""
        self._note_saved(filepath)
        if is_remote(filepath) or not (os.path.isdir(filepath) or os.path.islink(filepath)):
            super().remove_checkpoint(filepath)
        elif self.is_global_zero:
            remove(filepath)


def _warn_of_objects(checkpoint: Mapping[str, Any]) -> None:
    """Say what of ``checkpoint``, as it is written, is not read back without running a pickle."""
    if found := [f"{where} ({names})" for where, names in objects(checkpoint).items()]:
        rank_zero_warn(
            "The checkpoint holds more than tensors and plain values, so that it is read with weights_only=False "
            f"alone: {listed(found)}. Make strings and numbers of them, or leave hyper-parameters out by "
            "save_hyperparameters(ignore=[...])."
        )
