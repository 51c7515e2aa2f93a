"""Several adapters in one run, and averages of adapters, on two processes: what the adapters are in the end.

``adapters_script.py BASES OUT``, with commas between names; each base has a folder of its name in ``OUT``.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from distributed_script import finish, fsdp1, parallel
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from modules import Regression, adapter_state, loader, trainer
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard

from lightning_peft import LoRA, PEFTStrategy, adapter_names, inject, set_adapter


class Recorded(Regression):
    """Takes its share of the global batch, and writes down its adapters before and after training."""

    names = "ab"

    def __init__(self, out: Path, tag: str, sharded: bool) -> None:
        super().__init__()
        self.out, self.tag, self.sharded = out, tag, sharded
        if not sharded:
            self.inject()

    def inject(self) -> None:
        for seed, name in enumerate(self.names):
            inject(self, LoRA(r=2), name=name, seed=seed)

    def configure_model(self) -> None:
        if self.sharded and not isinstance(self.net, FSDPModule):
            self.inject()
            for part in (self.net[0], self.net[2], self.net):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def share(self, batch: list[Tensor]) -> Tensor:
        return batch[0][self.global_rank :: self.trainer.world_size]

    def loss_of(self, name: str, x: Tensor) -> Tensor:
        return (self(x) - (1 if name == "a" else -2) * x[:, :4]).square().mean()

    def configure_optimizers(self) -> Any:
        # SGD, so that the rounding of averaged gradients is not blown up as by Adam's division.
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def on_train_end(self) -> None:
        torch.save(adapter_state(self), self.out / f"{self.tag}-{self.global_rank}.pt")


class InTurns(Recorded):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        name = "ab"[batch_idx % 2]
        set_adapter(self, name)
        return self.loss_of(name, self.share(batch))


class Together(Recorded):
    """Both adapters have a part in every loss."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x = self.share(batch)
        with adapter_names(self, ["a"] * len(x) + ["b"] * len(x)):
            of_a, of_b = self(torch.cat([x, x])).chunk(2)
        return (of_a - x[:, :4]).square().mean() + (of_b + 2 * x[:, :4]).square().mean()


class Averaged(Recorded):
    """One adapter, whose average is validated, saved, and left at the end."""

    names = ("default",)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(self.share(batch))


KINDS: dict[str, type[Recorded]] = {"turns": InTurns, "together": Together, "averaged": Averaged}
BASES: dict[str, Any] = {"ddp": lambda: "ddp", "fsdp": fsdp1, "fsdp2": lambda: parallel(2, 1)}


def serves(base: str, tag: str) -> bool:
    """Whether ``base`` can: adapters in pieces are neither run row by row nor averaged."""
    return base != "fsdp2" or tag == "turns"


def run(out: Path, base: Any, tag: str, devices: int) -> None:
    sharded = devices > 1 and not isinstance(base, str) and base is BASES["fsdp2"]
    module = KINDS[tag](out, tag, sharded)
    callbacks: list[Callback] = [EMAWeightAveraging(decay=0.7)] if tag == "averaged" else []
    saver = ModelCheckpoint(out / f"{tag}-files", save_last=True)
    strategy = PEFTStrategy(LoRA(r=2), base=base if isinstance(base, str) else base())
    options: dict[str, Any] = {"max_epochs": 2, "devices": devices, "use_distributed_sampler": False}
    trainer(out, strategy, callbacks=[*callbacks, saver], **options).fit(module, loader(), loader())


def main() -> None:
    for base in sys.argv[1].split(","):
        out = Path(sys.argv[2], base)
        out.mkdir(exist_ok=True)
        for tag in KINDS:
            if serves(base, tag):
                run(out, BASES[base], tag, 2)
    finish()


if __name__ == "__main__":
    main()
