"""AdapterCheckpoint: Lightning's ModelCheckpoint whose checkpoints are adapter directories."""

from __future__ import annotations

from weakref import proxy

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_peft.checkpoint import AdapterDirectory
from lightning_peft.errors import PEFTError
from lightning_peft.strategy import PEFTStrategy


class AdapterCheckpoint(ModelCheckpoint):
    """``ModelCheckpoint`` with the same arguments, whose every checkpoint is a directory.

    A directory is at once a Lightning checkpoint (``trainer.fit(ckpt_path=directory)`` resumes from it) and an adapter
    in HF PEFT's format (``peft.PeftModel.from_pretrained(base, directory)`` and ``load_adapter`` read it). It is
    written beside its place and moved there when it is whole.
    """

    FILE_EXTENSION = ""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that there will be adapters to write.

        Raises:
            PEFTError: The trainer's strategy is no ``PEFTStrategy``.
        """
        if not isinstance(trainer.strategy, PEFTStrategy):
            raise PEFTError(
                f"AdapterCheckpoint was given with strategy {type(trainer.strategy).__name__}, which has no adapters. "
                "Use Trainer(strategy=PEFTStrategy(...)), or ModelCheckpoint."
            )
        super().setup(trainer, pl_module, stage)

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        # The one place that decides what is written; otherwise the body of the method that it replaces.
        trainer.save_checkpoint(filepath, self.save_weights_only, storage_options=AdapterDirectory())
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))
