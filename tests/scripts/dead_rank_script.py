"""Trains on two processes, of which one is killed at step 6: ``dead_rank_script.py OUT``."""

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from modules import Regression, loader, trainer

from lightning_peft import LoRA, PEFTStrategy
from lightning_peft.callbacks import AdapterCheckpoint


class Dying(Callback):
    def on_train_batch_start(self, run: Any, *_: Any) -> None:
        if run.global_step == 6 and run.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def main(out: Path) -> None:
    """Train until the other process is missed."""
    strategy = PEFTStrategy(LoRA(r=2), DDPStrategy(timeout=timedelta(seconds=60)))
    saver = AdapterCheckpoint(out / "checkpoints", save_last=True, every_n_train_steps=1)
    trainer(out, strategy, devices=2, callbacks=[Dying(), saver], max_epochs=20).fit(Regression(), loader())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
