"""Kills a run at random moments, fifty times, and lets it go on each time: ``soak_script.py OUT``."""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from modules import BATCH, Regression, adapter_state, trainer
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_peft import LoRA, PEFTStrategy
from lightning_peft.callbacks import AdapterCheckpoint
from lightning_peft.tasks.batches.resumable import ResumableLoader

KILLS = 50


class Slow(Regression):
    """Draws noise, and takes time, so that a kill may come anywhere in a step or in a save."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        time.sleep(0.002)
        return self.loss(batch[0] + torch.randn(()))


def fit(out: Path, name: str) -> None:
    """Train to the end, from the last checkpoint if there is one."""
    data = TensorDataset(torch.randn(16 * BATCH, 8, generator=torch.Generator().manual_seed(0)))
    torch.manual_seed(1 if name == "straight" or not (out / name).exists() else random.SystemRandom().getrandbits(30))
    strategy = PEFTStrategy(LoRA(r=2, dropout=0.2), merge_on_train_end=False)
    saver = AdapterCheckpoint(out / name, save_last=True, monitor="step", mode="max", every_n_train_steps=1)
    run = trainer(out, strategy, callbacks=[saver], max_steps=1500, max_epochs=-1)
    module = Slow()
    run.fit(module, ResumableLoader(data, batch_size=BATCH), ckpt_path="last")
    torch.save(adapter_state(module), out / f"{name}.pt")


def main(out: Path) -> None:
    """Run without a kill, and with fifty."""
    kills = 0
    while not (out / "killed.pt").exists():
        child = os.fork()
        if not child:
            fit(out, "killed")
            os._exit(0)
        time.sleep(0.3 + random.random() * 1.2)
        if kills < KILLS and os.waitpid(child, os.WNOHANG) == (0, 0):
            os.kill(child, signal.SIGKILL)
            kills += 1
            os.waitpid(child, 0)
        elif kills == KILLS:
            os.waitpid(child, 0)
    print(f"{kills} kills")
    fit(out, "straight")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
