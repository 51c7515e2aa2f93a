"""Runs cells of the matrix of base strategies on two processes: ``matrix_script.py OUT ALONE BASE=CELL,CELL …``.

``ALONE`` is the folder in which one process left its checkpoints. Each rank's ``OUT/rankN.pt`` holds what it saw.
"""

import faulthandler
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import lightning as L
import torch
from base_matrix import BASES, CELLS, STAGES, Text
from distributed_script import finish
from lightning.pytorch.callbacks import ModelCheckpoint
from modules import Stop, loader, trainer
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_peft import PEFTStrategy, unmerge
from lightning_peft.callbacks import AdapterCheckpoint
from lightning_peft.core.view import ModelView
from lightning_peft.operations.merge import is_merged
from lightning_peft.operations.shards import gathered
from lightning_peft.storage.state import saved_tensors
from lightning_peft.tensors.sharding import map_tensors, whole

LIMIT = 0.05
"""The norm to which gradients are clipped in the third epoch."""
COLUMNS, ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "net.up"), ("o_proj", "down_proj", "net.down")


class Cell(L.LightningModule):
    """Each rank takes its share of the global batch, but for tensor parallelism."""

    def __init__(self, base: str, cell: str) -> None:
        super().__init__()
        self.base, self.before = base, 0.0
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.net = CELLS[cell][0]()

    def configure_model(self) -> None:
        if self.base.startswith("fsdp2") and not isinstance(self.net, fsdp.FSDPModule):
            if self.base == "fsdp2":
                self.trainer.strategy.inject()
            for part in (*self.parts(), self.net):
                fsdp.fully_shard(part, mesh=self.device_mesh["data_parallel"])
        if self.base == "tensor" and not any(isinstance(p, DTensor) for p in self.parameters()):
            names = [name for name, module in self.named_modules() if isinstance(module, nn.Linear)]
            plan: dict[str, Any] = {name: ColwiseParallel() for name in names if name.endswith(COLUMNS)}
            plan |= {name: RowwiseParallel() for name in names if name.endswith(ROWS)}
            if "net.down" not in names and not isinstance(self.net, Text):
                plan["net.up"] = ColwiseParallel(output_layouts=Replicate())
            parallelize_module(self, self.device_mesh["tensor_parallel"], plan)

    def parts(self) -> list[nn.Module]:
        return list(self.net.model.model.layers) if isinstance(self.net, Text) else []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        rank, count = (0, 1) if self.base == "tensor" else (self.global_rank, self.trainer.world_size)
        return self.net(batch[0][rank::count])

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test", self.net(batch[0]))

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("validate", self.net(batch[0]))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        # SGD, so that the rounding of averaged gradients is not blown up as by Adam's division.
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        if self.current_epoch == 2:
            super().configure_gradient_clipping(*args, **kwargs)


def make(out: Path, base: str, cell: str, what: str) -> tuple[L.Trainer, Cell]:
    _, method, also = CELLS[cell]
    callbacks: list[L.Callback] = [
        AdapterCheckpoint(out / what / "directories", save_last=True, save_top_k=0),
        ModelCheckpoint(out / what / "files", save_last=True, save_top_k=0),
    ]
    options: dict[str, Any] = {"devices": 2 if base in BASES else 1, "use_distributed_sampler": False}
    if what == "stopped":
        callbacks.append(Stop(4))
    if base not in STAGES or what != "stopped":  # DeepSpeed clips by itself, from the first step
        options["gradient_clip_val"] = LIMIT
    L.seed_everything(0)
    strategy = PEFTStrategy(method, base=BASES[base]() if base in BASES else "auto", train_also=also)
    return trainer(out, strategy, max_epochs=3, callbacks=callbacks, **options), Cell(base, cell)


def alone(out: Path, cell: str) -> dict[str, Any]:
    """What one process learns in two epochs, stopped, and in three without a stop."""
    fitted, module = make(out, "auto", cell, "stopped")
    fitted.fit(module, loader(batch_size=8))
    seen = {"two": trained(module), "merged": is_merged(module)}
    (loss,) = fitted.test(module, loader(batch_size=16), verbose=False)
    fitted, module = make(out, "auto", cell, "through")
    fitted.fit(module, loader(batch_size=8))
    return {**seen, "loss": loss["test"], "three": trained(module)}


def run(out: Path, base: str, cell: str, single: Path) -> dict[str, Any]:
    """Train for two epochs, evaluate with that trainer and with another, unmerge, and go on from what was saved."""
    fitted, module = make(out, base, cell, "stopped")
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    fitted.fit(module, loader(batch_size=8))
    seen: dict[str, Any] = {"two": trained(module), "merged": is_merged(module)}
    last, data = out / "stopped" / "directories" / "last", loader(batch_size=16)
    again, fresh = make(out, base, cell, "again")
    losses = [
        *fitted.test(module, data, verbose=False),
        *fitted.validate(module, data, verbose=False),
        *fitted.test(module, data, ckpt_path=last, verbose=False),
        *again.test(fresh, data, ckpt_path=last, verbose=False),
    ]
    seen["losses"] = [next(iter(loss.values())) for loss in losses]
    seen["losses"] += [float(loss) for loss in again.predict(fresh, data)]
    seen["evaluated"] = trained(module)
    unmerge(module)
    whole_now = trained(module)
    seen["base is not back"] = [
        n for n, v in before.items() if n not in whole_now and not torch.equal(weight(module, n), v)
    ]
    starts = {"directory": last, "file": out / "stopped" / "files" / "last.ckpt"}
    for kind, start in {**starts, "one": single / "stopped" / "directories" / "last"}.items():
        resumed, module = make(out, base, cell, kind)
        resumed.fit(module, loader(batch_size=8), ckpt_path=start)
        seen[kind] = trained(module)
    return seen


def trained(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of all that is saved, whole."""
    return map_tensors(dict(saved_tensors(ModelView(module))), lambda tensor: whole(tensor).clone())


def weight(module: nn.Module, name: str) -> Tensor:
    host = module.get_submodule(name.rpartition(".")[0])
    with gathered(host):
        return whole(module.get_parameter(name)).clone()


def main() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    out, single = Path(sys.argv[1]), Path(sys.argv[2])
    seen: dict[str, Any] = {}
    for base, cell in json.loads(sys.argv[3]):
        # A process that waits for another in vain says where.
        faulthandler.dump_traceback_later(120, exit=True)
        try:
            seen[f"{base}: {cell}"] = run(out / base / folder_of(cell), base, cell, single / folder_of(cell))
        except Exception:
            # The other cells go on; the test of this one fails, or looks for a reason.
            seen[f"{base}: {cell}"] = traceback.format_exc()
    faulthandler.cancel_dump_traceback_later()
    torch.save(seen, out / f"rank{torch.distributed.get_rank()}.pt")
    finish()


def folder_of(cell: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in cell)


if __name__ == "__main__":
    main()
