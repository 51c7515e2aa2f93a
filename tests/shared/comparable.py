"""A run of a second whose best learning rate is known, and a grid of it, for tests of comparisons."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Known(pl.LightningModule):
    """Learns something small; its score on validation data is the better the nearer ``lr`` is to ``best``.

    On test data it is the other way round: whoever looked at them would choose another rate.

    Args:
        lr: Learning rate.
        best: The one with the best score.
        dies_with: The run with this seed kills itself once, at its third step.
        breaks: Raise an error in training.
        cancels: Kill the job of SLURM that this is.
        waits: Seconds that a training step takes.
    """

    def __init__(
        self,
        lr: float = 0.01,
        best: float = 0.01,
        dies_with: int | None = None,
        breaks: bool = False,
        cancels: bool = False,
        waits: float = 0.0,
    ) -> None:
        super().__init__()
        self.lr, self.best, self.dies_with, self.breaks, self.cancels = lr, best, dies_with, breaks, cancels
        self.waits = waits
        self.layer = nn.Linear(4, 4)
        self.data = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))

    def loss(self, batch: list[Tensor]) -> Tensor:
        return (self.layer(batch[0]) - batch[0].flip(-1)).pow(2).mean()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        time.sleep(self.waits)
        if self.breaks:
            raise RuntimeError("broken on purpose\nwith a second line")
        if self.cancels:
            subprocess.run(["scancel", "--signal=KILL", "--full", os.environ["SLURM_JOB_ID"]], check=True)
        died = Path(self.trainer.default_root_dir, "died")
        if self.global_step == 2 and torch.initial_seed() == self.dies_with and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log_dict({"val_loss": self.loss(batch), "val_score": -abs(math.log10(self.lr / self.best))})

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log_dict({"test_loss": self.loss(batch), "test_score": abs(math.log10(self.lr / self.best))})

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(self.data), batch_size=8, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(self.data), batch_size=16)

    test_dataloader = val_dataloader


def grid_file(folder: Path, **changes: Any) -> Path:
    """Write a grid of three ranks and two seeds into ``folder``, with its config; ``changes`` are of its entries."""
    method = {"class_path": "lightning_peft.LoRA", "init_args": {"r": 1, "target_modules": ["layer"]}}
    trainer = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_model_summary": False,
        "strategy": {"class_path": "lightning_peft.PEFTStrategy", "init_args": {"method": method}},
    }
    config = {"seed_everything": 0, "trainer": trainer, "model": {"class_path": "comparable.Known"}}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    grid = {
        "config": "run.yaml",
        "out": str(folder / "out"),
        "axes": {"rank": [1, 2, 3], "seed": [0, 1]},
        "report": {"validate": ["val_loss"], "test": ["test_loss"]},
    }
    (folder / "grid.yaml").write_text(yaml.safe_dump({**grid, **changes}, sort_keys=False))
    return folder / "grid.yaml"
