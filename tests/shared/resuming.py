"""A run with a break, beside the same run without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from modules import Llama, Stop, loader, trainer
from torch import Tensor

from lightning_peft import PEFTMethod, PEFTStrategy
from lightning_peft.callbacks import AdapterCheckpoint


class SteppedLlama(Llama):
    """Takes its batch by the number of the step, so that a resumed run sees what an uninterrupted one sees."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.global_step)
        ids = torch.randint(32, (2, 6), generator=generator)
        return self.model(input_ids=ids, labels=ids).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def logits(module: pl.LightningModule) -> Tensor:
    with torch.no_grad():
        return module.model.eval()(input_ids=torch.arange(6)[None]).logits  # type: ignore[operator, union-attr]


def straight_and_resumed(
    root: Path, kind: type[pl.LightningModule], method: PEFTMethod | list[PEFTMethod] | str
) -> tuple[Any, Any]:
    """Train for four steps, and for two and from their checkpoint for two more; ``root/straight/last`` is saved."""

    def fit(steps: int, folder: str, **options: Any) -> pl.LightningModule:
        callback = AdapterCheckpoint(dirpath=root / folder, save_last=True, every_n_train_steps=1)
        run = trainer(root, PEFTStrategy(method), callbacks=[callback, Stop(steps)], max_steps=4)
        module = kind()
        run.fit(module, loader(), **options)
        return module

    straight = fit(4, "straight")
    fit(2, "halves")
    return straight, fit(4, "resumed", ckpt_path=root / "halves" / "last")
