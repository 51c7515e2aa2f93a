"""How many bytes of gradients does DDP send in a step? Two processes on a CPU; deterministic."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils.data import DataLoader

from benchmarks.checkpoints import QUIET, Module
from benchmarks.report import MB, Options, Table, answer
from lightning_peft import LoRA, PEFTStrategy


class Counter(pl.Callback):
    """Counts what DDP's buckets hold, and what the trained parameters do; written by the first process."""

    def __init__(self, path: Path) -> None:
        self.path, self.sent = path, 0

    def hook(self, state, bucket):  # DDP takes only its own annotations
        self.sent += bucket.buffer().nbytes
        return allreduce_hook(None, bucket)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.strategy.model.register_comm_hook(None, self.hook)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            trained = sum(p.nbytes for p in pl_module.parameters() if p.requires_grad)
            searches = trainer.strategy.model.find_unused_parameters
            content = {"sent": self.sent / trainer.global_step, "trained": trained, "searches": searches}
            self.path.write_text(json.dumps(content))


def count(layers: int, peft: bool) -> dict[str, Any]:
    """Train for some steps in two processes; return bytes sent in a step, bytes trained, and whether DDP searches."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "counts.json"
        ddp = DDPStrategy(start_method="spawn", process_group_backend="gloo")
        strategy = PEFTStrategy(LoRA(r=8), base=ddp, merge_on_train_end=False) if peft else ddp
        options = {**QUIET, "devices": 2, "max_steps": 2, "strategy": strategy, "callbacks": [Counter(path)]}
        data = DataLoader(torch.randint(0, 1000, (8, 16)), batch_size=1)
        pl.Trainer(default_root_dir=folder, **options).fit(Module(layers), data)
        content: dict[str, Any] = json.loads(path.read_text())
        return content


def main(options: Options) -> list[Table]:
    """Count bytes sent by DDP."""
    layers = 1 if options.quick else 4
    columns = ["variant", "MB sent in a step", "MB trained", "searches for unused parameters"]
    table = Table("traffic", f"DDP on two processes, {layers} layers of SmolLM2", columns)
    for name, peft in (("lightning_peft", True), ("full fine-tuning", False)):
        found = count(layers, peft)
        table.rows.append([name, found["sent"] / MB, found["trained"] / MB, "yes" if found["searches"] else "no"])
    return [table]


if __name__ == "__main__":
    answer(main)
