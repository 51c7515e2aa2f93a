"""Trains on two processes, with a break and without, with dropout and shuffling: ``continuing_script.py OUT``."""

import random
import sys
from pathlib import Path
from typing import Any

import torch
from modules import Regression, Stop, adapter_state, loader, trainer
from torch import Tensor

from lightning_peft import LoRA, PEFTStrategy
from lightning_peft.callbacks import AdapterCheckpoint


class Noisy(Regression):
    """Each process draws noise of its own."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch[0] + torch.randn(()) + random.random())


def main(out: Path) -> None:
    """Write down what each process ended with."""

    def fit(folder: str, stop: int, seed: int, **resume: Any) -> None:
        strategy = PEFTStrategy(LoRA(r=2, dropout=0.3), "ddp", merge_on_train_end=False)
        saver = AdapterCheckpoint(out / folder, save_top_k=-1, every_n_train_steps=2, filename="{step}")
        run = trainer(out, strategy, devices=2, callbacks=[saver, Stop(stop)], max_epochs=4)
        rank = run.global_rank
        torch.manual_seed(seed + rank)
        random.seed(seed + rank)
        module = Noisy()
        run.fit(module, loader(), **resume)
        drawn = [float(torch.rand(())), random.random()]
        torch.save({"adapters": adapter_state(module), "drawn": drawn}, out / f"{folder}-{rank}.pt")

    fit("straight", 8, 1)
    fit("halves", 4, 1)
    fit("resumed", 8, 11, ckpt_path=out / "halves" / "step=4")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
