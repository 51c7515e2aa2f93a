"""Trains on two processes and leaves what each rank ended with in a directory: ``ddp_script.py BASE OUT``."""

import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from modules import Regression, adapter_state, inputs, loader, trainer

from lightning_peft import LoRA, PEFTStrategy
from lightning_peft.callbacks import AdapterCheckpoint
from lightning_peft.merge import is_merged


class Recorded(Regression):
    """Every rank writes down its adapters and outputs when fit has ended, that is after the merge."""

    def __init__(self, out: Path, tag: str) -> None:
        super().__init__()
        self.out, self.tag = out, tag

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        # Each rank takes its share of the global batch. Lightning's sampler would shuffle.
        return self.loss(batch[0][self.global_rank :: self.trainer.world_size])

    def configure_optimizers(self) -> Any:
        # SGD, so that the rounding of averaged gradients is not blown up as by Adam's division.
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def on_fit_end(self) -> None:
        record(self, f"{self.tag}-rank{self.global_rank}")


def record(module: Recorded, name: str) -> None:
    with torch.no_grad():
        content = {"adapters": adapter_state(module), "outputs": module(inputs()), "merged": is_merged(module)}
    torch.save(content, module.out / f"{name}.pt")


def run(out: Path, tag: str, base: str, devices: int, epochs: int, resume: Path | None = None) -> None:
    """Train; two devices see together the batches that one device sees alone."""
    callbacks = [
        AdapterCheckpoint(out / f"{tag}-directories", save_last=True, save_top_k=0),
        ModelCheckpoint(out / f"{tag}-files", save_last=True, save_top_k=0),
    ]
    options: dict[str, Any] = {"devices": devices, "max_epochs": epochs, "use_distributed_sampler": False}
    # The adapters' initial values depend on it, here and in the process of the tests.
    L.seed_everything(0)
    module = Recorded(out, tag)
    fitted = trainer(out, PEFTStrategy(LoRA(r=2), base=base), callbacks=callbacks, **options)
    fitted.fit(module, loader(batch_size=8), ckpt_path=resume)
    if fitted.is_global_zero:
        record(module, f"{tag}-main")


def main() -> None:
    base, out = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    run(out, "two", base, 2, 2)
    run(out, "three", base, 2, 3, out / "two-directories" / "last")


if __name__ == "__main__":
    main()
