"""Works by hand on modules that a strategy has cut up over two processes, each time after a look at the outputs.

``by_hand_script.py OUT`` leaves what each rank saw there, by base.
"""

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed_script
import lightning as L
import torch
from distributed_script import CPUFSDPStrategy, Recorded, Sharded, Split, finish, fsdp1, parallel
from modules import inputs, loader, trainer
from torch import Tensor
from torch.distributed import fsdp

from lightning_peft import LoRA, PEFTStrategy, adapter_state_dict, eject, load_adapter, merge, save_adapter, unmerge
from lightning_peft.operations.merge import is_merged
from lightning_peft.operations.shards import gathered
from lightning_peft.tensors.sharding import map_tensors, whole


class Outermost(Sharded):
    """The third layer belongs to the outermost unit, which stays gathered after a look."""

    def configure_model(self) -> None:
        if isinstance(self.net, fsdp.FSDPModule):
            return
        self.inject_first()
        for part in (self.net[0], self.net):
            fsdp.fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def inject_first(self) -> None:
        self.trainer.strategy.inject()


class OutermostLate(Outermost):
    def inject_first(self) -> None:
        """Leave it to the strategy."""


class Alone(Outermost):
    """On a mesh of one process: each has the whole model, and sees the whole batch."""

    def share(self) -> tuple[int, int]:
        return 0, 1


BASES: dict[str, tuple[Callable[[], Any], type[Recorded]]] = {
    "ddp": (lambda: "ddp", Recorded),
    # The layers are in the outermost unit, or each in one of its own.
    "fsdp": (CPUFSDPStrategy, Recorded),
    "fsdp_kept": (partial(fsdp1, sharding_strategy="SHARD_GRAD_OP"), Recorded),
    "fsdp_whole": (partial(fsdp1, sharding_strategy="NO_SHARD"), Recorded),
    "fsdp2": (lambda: parallel(2, 1), Outermost),
    "fsdp2_late": (lambda: parallel(2, 1), OutermostLate),
    "fsdp2_of_one": (lambda: parallel(1, 2), Alone),
    "tensor": (lambda: parallel(1, 2), Split),
    "stage1": (lambda: deepspeed_script.base(1), Recorded),
    "stage3": (lambda: deepspeed_script.base(3), Recorded),
}


def fit(out: Path, base: str, epochs: int = 2, merged: bool = False) -> tuple[L.Trainer, Any]:
    make, kind = BASES[base]
    L.seed_everything(0)
    strategy = PEFTStrategy(LoRA(r=2), base=make(), merge_on_train_end=merged)
    fitted = trainer(out, strategy, max_epochs=epochs, devices=2, use_distributed_sampler=False)
    module = kind(out, "by-hand")
    module.on_fit_end = lambda: None
    fitted.fit(module, loader(batch_size=8))
    return fitted, module


def other_trainer(out: Path, base: str, module: Any) -> str:
    """Return what a Trainer says that is given a module which another one has trained."""
    strategy = PEFTStrategy(LoRA(r=2), base=BASES[base][0]())
    fitted = trainer(out, strategy, devices=2, use_distributed_sampler=False)
    return deepspeed_script.error(lambda: fitted.test(module, loader(), verbose=False))


def look(module: Any) -> Tensor:
    with torch.no_grad():
        return torch.tensor(module.trainer.strategy.model(inputs()).tolist())


def adapters(module: Any) -> dict[str, Tensor]:
    return map_tensors(dict(adapter_state_dict(module)), lambda tensor: whole(tensor).clone())


def weights(module: Any) -> dict[str, Tensor]:
    found = {}
    for name in (f"net.{layer}.{what}" for layer in (0, 2) for what in ("weight", "bias")):
        with gathered(module.get_submodule(name.rpartition(".")[0])):
            found[name] = whole(module.get_parameter(name)).clone()
    return found


def by_hand(out: Path, base: str) -> dict[str, Any]:
    """Merge, save, unmerge, load and eject by hand, never without a look before."""
    fitted, module = fit(out, base)
    seen: dict[str, Any] = {"trained": look(module)}
    if base == "fsdp":
        seen["another trainer"] = other_trainer(out, base, module)
        module.trainer = fitted
    if base == "stage3":
        from deepspeed import zero

        with zero.GatheredParameters([module.net[2].weight], modifier_rank=0):
            seen["in a context"] = deepspeed_script.error(lambda: merge(module))
    merge(module)
    seen["merged"] = look(module)
    # A run puts the shards back.
    seen["loss later"] = fitted.test(module, loader(batch_size=16), verbose=False)[0]["test_loss"]
    seen["merged later"], seen["is merged"] = look(module), is_merged(module)
    save_adapter(module, out / f"{base}-merged")
    look(module)
    unmerge(module)
    seen["unmerged"] = weights(module)
    look(module)
    save_adapter(module, out / f"{base}-saved")
    look(module)
    seen["state"] = adapters(module)
    load_adapter(module, out / "other")
    seen["loaded"] = look(module)
    merge(module)
    look(module)
    eject(module)
    seen["ejected"], seen["plain"] = weights(module), look(module)
    return seen


def from_a_checkpoint(out: Path, base: str) -> dict[str, Any]:
    """Go on from a checkpoint, in a module whose outputs were looked at since it was trained and merged."""
    seen = {}
    for what in ("test", "fit"):
        fitted, module = fit(out, base, merged=True)
        look(module)
        if what == "test":
            fitted.test(module, loader(), ckpt_path=out / "other.ckpt", verbose=False)
        else:
            fitted.fit_loop.max_epochs = 3  # the epochs of the checkpoint: nothing is left to train
            fitted.fit(module, loader(batch_size=8), ckpt_path=out / "other.ckpt")
        seen[what] = adapters(module)
        look(module)
        unmerge(module)
        seen[f"{what} unmerged"] = weights(module)
    return seen


def main() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    out = Path(sys.argv[1])
    seen: dict[str, Any] = {}
    for base in BASES:
        seen[base] = by_hand(out, base)
        seen[base]["checkpoint"] = from_a_checkpoint(out, base)
    torch.save(seen, out / f"rank{torch.distributed.get_rank()}.pt")
    finish()


if __name__ == "__main__":
    main()
