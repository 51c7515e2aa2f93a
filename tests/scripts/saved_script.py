"""Trains on two processes modules of which more changes than is trained: ``saved_script.py BASES OUT``."""

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from distributed_script import BASES, finish
from lightning.pytorch.callbacks import ModelCheckpoint
from modules import loader, trainer

from lightning_peft import LoRA, PEFTStrategy
from lightning_peft.callbacks import AdapterCheckpoint
from lightning_peft.tensors.sharding import local_part


def changing(base: str, writes: bool) -> type[L.LightningModule]:
    """Return a class that counts its steps in a buffer and, if it ``writes``, adds 1 to one process's frozen weights.

    That is what this process has of them; without shards every process does it.
    """

    class Changing(BASES[base][1]):  # type: ignore[misc]
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.register_buffer("steps", torch.zeros(()))

        def on_train_batch_start(self, *args: Any) -> None:
            self.steps += 1
            if writes and self.global_step == 1 and (not base.startswith("fsdp2") or self.global_rank == 1):
                local_part(self.net[0].weight.data).add_(1)

    return Changing


def run(base: str, out: Path) -> None:
    writes = base != "fsdp"  # whose flat pieces are not watched
    savers = [kind(out / kind.__name__, save_last=True, save_top_k=0) for kind in (ModelCheckpoint, AdapterCheckpoint)]
    L.seed_everything(0)
    strategy = PEFTStrategy(LoRA(r=2), base=BASES[base][0](), merge_on_train_end=False)
    options: dict[str, Any] = {"max_epochs": 2, "devices": 2, "use_distributed_sampler": False}
    module = changing(base, writes)(out, "saved")
    trainer(out, strategy, callbacks=savers, **options).fit(module, loader(batch_size=8))


def main() -> None:
    for base in sys.argv[1].split(","):
        out = Path(sys.argv[2], base)
        out.mkdir(exist_ok=True)
        run(base, out)
    finish()


if __name__ == "__main__":
    main()
