"""Trains methods on two processes: ``deltas_script.py OUT`` leaves each rank's adapters in ``OUT``."""

import sys
from pathlib import Path

import lightning as L
import torch
from distributed_script import BASES, CPUFSDPStrategy, Recorded, Sharded, finish
from modules import adapter_state, loader, trainer
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.nn import functional

from lightning_peft import AdaLoRA, LoKr, LoRA, NewTokens, PEFTMethod, PEFTStrategy

METHODS: dict[str, PEFTMethod] = {
    "adalora": AdaLoRA(init_r=4, target_r=2, tinit=1, tfinal=1),
    "lokr": LoKr(r=1, decompose_both=True),
    "pissa": LoRA(r=2, init="pissa"),
    "new_tokens": NewTokens(token_indices=[1, 2, 9], target_modules=["net.0"]),
}


class Words(Recorded):
    """Predicts a token from the one before, with one weight for the embedding and the head."""

    def build(self) -> nn.Module:
        net = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 10, bias=False))
        net[2].weight = net[0].weight
        return net

    def loss(self, x: Tensor) -> Tensor:
        ids = (x * 3).long().abs() % 10
        return functional.cross_entropy(self.net(ids).flatten(0, 1), ids.roll(1, dims=1).flatten())

    def on_fit_end(self) -> None:
        """Record nothing: outputs are of other inputs there."""


class ShardedWords(Words):
    def configure_model(self) -> None:
        if not isinstance(self.net, fsdp.FSDPModule):
            self.trainer.strategy.inject()
            fsdp.fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


TESTED = ("ddp", "fsdp", "fsdp2")


def run(out: Path, base: str, devices: int) -> None:
    """Train; two devices see together the batches that one device sees alone."""
    for name, method in METHODS.items():
        L.seed_everything(0)
        below, module_class = BASES[base]
        if name == "new_tokens":
            module_class = ShardedWords if module_class is Sharded else Words
        module = module_class(out, base)
        # A weight that two modules have is in one unit.
        below = CPUFSDPStrategy if (name, base) == ("new_tokens", "fsdp") else below
        fitted = trainer(
            out, PEFTStrategy(method, base=below()), max_epochs=3, devices=devices, use_distributed_sampler=False
        )
        fitted.fit(module, loader(batch_size=8))
        torch.save(adapter_state(module), out / f"{name}-{base}-{fitted.global_rank}.pt")


if __name__ == "__main__":
    for name in TESTED:
        run(Path(sys.argv[1]), name, 2)
    finish()
