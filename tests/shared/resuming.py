"""A run with a break, beside the same run without one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from modules import Llama, Stop, loader, trainer
from torch import Tensor

from lightning_peft import PEFTMethod, PEFTStrategy
from lightning_peft.callbacks import AdapterCheckpoint

Module = TypeVar("Module", bound=pl.LightningModule)


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
    root: Path,
    kind: Callable[[], Module],
    method: PEFTMethod | list[PEFTMethod] | str,
    *,
    steps: int = 4,
    stop: int = 2,
    file: bool = False,
    **options: Any,
) -> tuple[Module, Module]:
    """Train without a break, and with one: up to a step, and from the checkpoint of that step to the end.

    Args:
        root: Where ``straight/last`` is the last checkpoint of the first run.
        kind: Makes the module, which is the same each time.
        method: What is trained.
        steps: All steps.
        stop: The one after which there is the break.
        file: Checkpoints are files, not directories.
        options: The strategy's other options.
    """
    checkpoint: Any = ModelCheckpoint if file else AdapterCheckpoint

    def fit(folder: str, end: int, **resume: Any) -> Module:
        saved = checkpoint(dirpath=root / folder, save_last=True, every_n_train_steps=1)
        run = trainer(root, PEFTStrategy(method, **options), callbacks=[saved, Stop(end)], max_steps=steps)
        module = kind()
        run.fit(module, loader(), **resume)
        assert run.global_step == end
        return module

    straight = fit("straight", steps)
    fit("halves", stop)
    return straight, fit("resumed", steps, ckpt_path=root / "halves" / ("last.ckpt" if file else "last"))
