"""Trains on two processes with a loss that is NaN in one step on one of them: ``nonfinite_script.py BASE OUT``."""

import sys
from pathlib import Path
from typing import Any

import torch
from distributed_script import CPUFSDPStrategy, Sharded
from lightning.pytorch.strategies import ModelParallelStrategy
from modules import Regression, adapter_state, loader, trainer
from torch import Tensor

from lightning_peft import LoRA, PEFTStrategy
from lightning_peft.callbacks import AdapterCheckpoint
from lightning_peft.tensors.sharding import whole


class OneBadLoss(Regression):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.global_rank == 1 and self.global_step == 3 else loss


class ShardedOneBadLoss(OneBadLoss):
    configure_model = Sharded.configure_model


def main(name: str, out: Path) -> None:
    """Train with each choice and write down what each process ended with."""
    for choice in ("stop", "skip", "restore"):
        bases: dict[str, Any] = {"fsdp": CPUFSDPStrategy, "model_parallel": ModelParallelStrategy}
        base = bases[name]() if name in bases else name
        strategy = PEFTStrategy(LoRA(r=2), base, on_nonfinite=choice, merge_on_train_end=False)
        saver = AdapterCheckpoint(out / choice, save_last=True, every_n_train_steps=2)
        run = trainer(out, strategy, devices=2, callbacks=[saver], max_epochs=4)
        module = ShardedOneBadLoss() if name == "model_parallel" else OneBadLoss()
        run.fit(module, loader())
        adapters = {key: whole(value) for key, value in adapter_state(module).items()}
        steps = run.global_step
        torch.save({"steps": steps, "adapters": adapters}, out / f"{choice}-{run.global_rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
