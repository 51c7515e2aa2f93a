"""Checkpoints in the middle of an accumulation, on two processes: ``accumulation_script.py OUT SINGLE``.

Leaves in ``OUT`` what each rank ended with, by base: uninterrupted, and resumed from each of the checkpoints.
``SINGLE`` holds those of one process.
"""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from distributed_script import finish
from modules import loader, trainer
from steps_script import BASES, Net
from torch import Tensor

from lightning_peft import LoRA, PEFTStrategy
from lightning_peft.core.view import ModelView
from lightning_peft.storage.checkpoint_directory import AdapterDirectory
from lightning_peft.storage.state import adapter_parameters_and_whole
from lightning_peft.tensors.sharding import map_tensors, whole

FILES = {"middle.ckpt": None, "middle": AdapterDirectory()}
MIDDLE = (1, 4)
"""Epoch and number of a batch after which the gradients of one or two of three batches wait for a step."""


class ByNumber(Net):
    """Takes its batch by its number, so that a resumed run sees what an uninterrupted one sees."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        generator = torch.Generator().manual_seed(10 * self.current_epoch + batch_idx)
        return super().training_step([torch.randn(8, 8, generator=generator)], batch_idx)


class Saving(L.Callback):
    """Saves in the middle, and keeps the warnings of that."""

    def __init__(self, out: Path) -> None:
        self.out, self.said = out, list[str]()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == MIDDLE:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for name, options in FILES.items():
                    trainer.save_checkpoint(self.out / name, storage_options=options)
            self.said = [str(warning.message) for warning in caught]


def run(out: Path, base: str, resume: Path | None = None) -> dict[str, Any]:
    """Train, or go on from ``resume``, with a step after every third of eight batches and at the end of each epoch."""
    L.seed_everything(0)
    module, alone, saving = ByNumber(out, base, "sgd"), base not in BASES, Saving(out)
    strategy = PEFTStrategy(LoRA(r=2), base="auto" if alone else BASES[base](), merge_on_train_end=False)
    options: dict[str, Any] = {
        "devices": 1 if alone else 2,
        "use_distributed_sampler": False,
        "accumulate_grad_batches": 3,
    }
    callbacks = [saving] if resume is None else []
    fitted = trainer(out, strategy, max_epochs=3, enable_checkpointing=False, callbacks=callbacks, **options)
    fitted.fit(module, loader(count=64, batch_size=8), ckpt_path=resume)
    trained = dict(adapter_parameters_and_whole(ModelView(module)))
    return {"trained": map_tensors(trained, lambda tensor: whole(tensor).clone()), "said": saving.said}


def everything(out: Path, base: str, single: Path) -> dict[str, Any]:
    """Train, and go on from what this and what one process has saved."""
    out.mkdir(exist_ok=True)
    seen = {"uninterrupted": run(out, base)}
    if not base.startswith("stage"):
        seen |= {name: run(out, base, out / name) for name in FILES}
        seen |= {f"one {name}": run(out, base, single / name) for name in FILES}
    return seen


def main() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    out = Path(sys.argv[1])
    seen = {base: everything(out / base, base, Path(sys.argv[2])) for base in BASES}
    torch.save(seen, out / f"rank{torch.distributed.get_rank()}.pt")
    finish()


if __name__ == "__main__":
    main()
