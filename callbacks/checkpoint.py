"""AdapterCheckpoint: Lightning's ModelCheckpoint whose checkpoints are adapter directories."""

from __future__ import annotations

from weakref import proxy

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed import all_gather_object

from lightning_peft.callbacks.last import WritesDirectories, install
from lightning_peft.callbacks.other_lightning import refuse_other_lightning
from lightning_peft.errors import PEFTError
from lightning_peft.storage.checkpoint_directory import AdapterDirectory, refuse_remote

install()


class AdapterCheckpoint(ModelCheckpoint):
    """``ModelCheckpoint`` with the same arguments, whose every checkpoint is a directory.

    A directory is at once a Lightning checkpoint (``trainer.fit(ckpt_path=directory)`` resumes from it) and an adapter
    in HF PEFT's format (``peft.PeftModel.from_pretrained(base, directory)`` and ``load_adapter`` read it). It is
    written beside its place and moved there when it is whole.

    ``trainer.fit(ckpt_path="last")`` resumes from the newest ``last`` in ``dirpath`` or starts anew if there is none,
    so that a command can be given again as it is. It takes ``save_last=True`` and a ``dirpath`` that all nodes share.
    """

    FILE_EXTENSION = ""
    _found_last = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that there will be adapters to write, and that either all processes resume or none.

        Raises:
            PEFTError: The trainer's strategy is no ``PEFTStrategy``, or it is of another distribution of Lightning;
                ``dirpath`` is no local one; or some processes found no checkpoint to resume.
        """
        refuse_other_lightning(trainer, "The Trainer")
        if not isinstance(trainer.strategy, WritesDirectories):
            raise PEFTError(
                f"AdapterCheckpoint was given with strategy {type(trainer.strategy).__name__}, which has no adapters. "
                "Use Trainer(strategy=PEFTStrategy(...)), or ModelCheckpoint."
            )
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            refuse_remote(self.dirpath or "")
            self._compare(trainer, int(self._found_last), "found")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that all processes begin at the same step.

        Raises:
            PEFTError: They do not.
        """
        super().on_train_start(trainer, pl_module)
        self._compare(trainer, trainer.global_step, "of step")

    def _compare(self, trainer: pl.Trainer, number: int, what: str) -> None:
        # Every process looks for the last checkpoint by itself; if they differ, they train apart until one hangs.
        numbers = [number] * trainer.world_size
        if trainer.world_size > 1:
            all_gather_object(numbers, number)
        if len(set(numbers)) > 1:
            raise PEFTError(
                f"The processes would not resume from one checkpoint. Checkpoints {what}, by rank: {numbers}. Give a "
                f"dirpath on a file system that all nodes share; here it is {self.dirpath}."
            )

    def _find_last_checkpoints(self, trainer: pl.Trainer) -> set[str]:
        paths = super()._find_last_checkpoints(trainer)
        self._found_last = bool(paths)
        return paths

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        # The one place that decides what is written; otherwise the body of the method that it replaces.
        trainer.save_checkpoint(filepath, self.save_weights_only, storage_options=AdapterDirectory())
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))
