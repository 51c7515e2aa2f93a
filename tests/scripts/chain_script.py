"""One epoch on one base, from what another left: ``chain_script.py BASE PROCESSES EPOCHS OUT FROM``.

``FROM`` may be ``nothing``.
``OUT`` gets a directory ``last``, and a file of each rank with what it held in the end.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed_script
import lightning as L
import torch
from distributed_script import finish, fsdp1, parallel
from modules import loader, trainer
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_peft import LoRA, PEFTStrategy
from lightning_peft.callbacks import AdapterCheckpoint
from lightning_peft.core.view import ModelView
from lightning_peft.storage.state import saved_tensors
from lightning_peft.tensors.sharding import map_tensors, whole

BASES: dict[str, Callable[[int], Any]] = {
    "auto": lambda count: "auto",
    "ddp": lambda count: "ddp",
    "fsdp": lambda count: fsdp1(),
    "fsdp2": lambda count: parallel(count, 1),
    "fsdp2_late": lambda count: parallel(count, 1),
    "tensor": lambda count: parallel(1, count),
    "both": lambda count: parallel(count // 2, 2),
    "stage1": lambda count: deepspeed_script.base(1),
    "stage2": lambda count: deepspeed_script.base(2),
    "stage3": lambda count: deepspeed_script.base(3),
}


class Chained(L.LightningModule):
    """Sizes that few numbers of processes divide; a head and a norm are trained whole beside the adapters."""

    def __init__(self, base: str) -> None:
        super().__init__()
        self.base = base
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.net = nn.Sequential(
                nn.Linear(8, 9), nn.LayerNorm(9), nn.Linear(9, 14), nn.Tanh(), nn.Linear(14, 7), nn.Linear(7, 5)
            )

    def configure_model(self) -> None:
        if any(isinstance(parameter, DTensor) for parameter in self.parameters()):
            return
        if self.base in ("tensor", "both"):
            plan = {"2": ColwiseParallel(), "4": RowwiseParallel()}
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)
        if self.base in ("fsdp2", "both"):
            self.trainer.strategy.inject()
        if self.base.startswith(("fsdp2", "both")):
            for part in (self.net[2], self.net[4], self.net):
                fsdp.fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        rank, count = self.global_rank, self.trainer.world_size
        if self.base in ("tensor", "both"):
            mesh = self.device_mesh["data_parallel"]
            rank, count = mesh.get_local_rank(), mesh.size()
        x = batch[0][rank::count]
        return (self.net(x) - x[:, :5]).square().mean()

    def configure_optimizers(self) -> Any:
        # Without the epsilon the rounding of averaged gradients is blown up where they are small.
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02, eps=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def run(base: str, count: int, epochs: int, out: Path, start: Path | None) -> None:
    """Go on from ``start`` until ``epochs`` are done; several devices see together what one sees alone."""
    L.seed_everything(0)
    also = ["net.1", "net.5"]
    strategy = PEFTStrategy(LoRA(r=3), base=BASES[base](count), train_also=also, merge_on_train_end=False)
    saver = AdapterCheckpoint(out, save_last=True, save_top_k=0)
    options: dict[str, Any] = {"devices": count, "use_distributed_sampler": False, "gradient_clip_val": 0.5}
    module = Chained(base)
    fitted = trainer(out, strategy, callbacks=[saver], max_epochs=epochs, **options)
    fitted.fit(module, loader(24, batch_size=12), ckpt_path=start)
    state = map_tensors(dict(saved_tensors(ModelView(module))), lambda tensor: whole(tensor).clone())
    torch.save(state, out / f"rank{fitted.global_rank}.pt")


def main() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    base, count, epochs, out, start = sys.argv[1:]
    run(base, int(count), int(epochs), Path(out), None if start == "nothing" else Path(start))
    finish()


if __name__ == "__main__":
    main()
