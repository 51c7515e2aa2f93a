"""Trains on two processes, on one base strategy after the other, and leaves what each rank ended with.

``distributed_script.py BASES OUT SINGLE``, with commas between names; each base has a folder of its name in ``OUT``.
"""

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from modules import Regression, adapter_state, inputs, loader, trainer
from torch import nn
from torch.distributed import fsdp
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_peft import LoRA, PEFTStrategy, eject
from lightning_peft.callbacks import AdapterCheckpoint
from lightning_peft.operations.merge import is_merged
from lightning_peft.operations.shards import gathered
from lightning_peft.tensors.sharding import local_part, whole


class CPUFSDPStrategy(FSDPStrategy):
    """Lifts two refusals of CPUs: Lightning's, which asks for the exact class, and torch's of a missing device.

    Lightning passes a device's index, of which a CPU has none; torch then looks for an accelerator.
    """

    def _setup_model(self, model: nn.Module) -> nn.Module:
        class OnCPU(fsdp.FullyShardedDataParallel):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **{**kwargs, "device_id": torch.device("cpu")})

        with mock.patch("torch.distributed.fsdp.FullyShardedDataParallel", OnCPU):
            return super()._setup_model(model)


class Recorded(Regression):
    """Every rank writes down its adapters and outputs when fit has ended, that is after the merge."""

    def __init__(self, out: Path, tag: str) -> None:
        super().__init__()
        self.out, self.tag = out, tag

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        # Each rank takes its share of the global batch. Lightning's sampler would shuffle.
        rank, count = self.share()
        return self.loss(batch[0][rank::count])

    def share(self) -> tuple[int, int]:
        return self.global_rank, self.trainer.world_size

    def configure_optimizers(self) -> Any:
        # SGD, so that the rounding of averaged gradients is not blown up as by Adam's division.
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def on_fit_end(self) -> None:
        record(self, self.trainer.strategy.model, f"{self.tag}-rank{self.global_rank}")


class Sharded(Recorded):
    """Shards itself as the strategy's user would, with the call that shards the adapters too."""

    def configure_model(self) -> None:
        if isinstance(self.net, fsdp.FSDPModule):
            return
        self.trainer.strategy.inject()
        mesh = self.device_mesh["data_parallel"]
        for layer in (self.net[0], self.net[2]):
            fsdp.fully_shard(layer, mesh=mesh)
        fsdp.fully_shard(self.net, mesh=mesh)


class ShardedLate(Sharded):
    """Shards itself and knows nothing of adapters."""

    def configure_model(self) -> None:
        with mock.patch.object(self.trainer.strategy, "inject"):
            super().configure_model()


class Split(Recorded):
    """Split by tensor parallelism: every rank sees the whole batch."""

    def share(self) -> tuple[int, int]:
        mesh = self.device_mesh["data_parallel"]
        return mesh.get_local_rank(), mesh.size()

    def configure_model(self) -> None:
        if isinstance(self.net[0].weight, DTensor):
            return
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)


class SplitAndSharded(Split):
    """Split by tensor parallelism, then sharded: four processes."""

    def configure_model(self) -> None:
        if isinstance(self.net, fsdp.FSDPModule):
            return
        super().configure_model()
        self.trainer.strategy.inject()
        mesh = self.device_mesh["data_parallel"]
        for layer in (self.net[0], self.net[2]):
            fsdp.fully_shard(layer, mesh=mesh)
        fsdp.fully_shard(self.net, mesh=mesh)


def parallel(data: int, tensor: int, shards: bool = False) -> ModelParallelStrategy:
    return ModelParallelStrategy(data, tensor, save_distributed_checkpoint=shards)


def fsdp1(**options: Any) -> FSDPStrategy:
    return CPUFSDPStrategy(auto_wrap_policy={nn.Linear}, **options)


STARTED_HERE = ("ddp_fork", "ddp_notebook", "ddp_spawn")
"""Strategies that start all workers from this process, for one run each."""
BASES: dict[str, tuple[Callable[[], Strategy | str], type[Recorded]]] = {
    "auto": (lambda: "auto", Recorded),
    "ddp": (lambda: "ddp", Recorded),
    **{base: (partial(str, base), Recorded) for base in STARTED_HERE},
    "fsdp": (fsdp1, Recorded),
    "fsdp_by_size": (
        lambda: CPUFSDPStrategy(auto_wrap_policy=partial(size_based_auto_wrap_policy, min_num_params=100)),
        Recorded,
    ),
    "fsdp_whole": (lambda: CPUFSDPStrategy(sharding_strategy="SHARD_GRAD_OP"), Recorded),
    "fsdp_shards": (lambda: fsdp1(state_dict_type="sharded"), Recorded),
    "fsdp2": (lambda: parallel(2, 1), Sharded),
    "fsdp2_late": (lambda: parallel(2, 1), ShardedLate),
    "fsdp2_shards": (lambda: parallel(2, 1, shards=True), Sharded),
    "tensor": (lambda: parallel(1, 2), Split),
    "tensor_shards": (lambda: parallel(1, 2, shards=True), Split),
    "both": (lambda: parallel(2, 2), SplitAndSharded),
}


STARTS = (STARTED_HERE, tuple(base for base in BASES if base not in ("auto", "both", *STARTED_HERE)), ("both",))
"""Bases that follow one another in the same processes, since most of the time goes into starting them."""

# On a CPU, where gathered parameters are already, offloading them there frees memory that is still read (torch 2.13).
NO_FULL_STATE = ("fsdp", "fsdp_by_size", "fsdp_whole")


def record(module: Recorded, model: nn.Module, name: str) -> None:
    """Write down the adapters, whole, and the outputs of the model as the strategy holds it."""
    with torch.no_grad():
        # Tensor parallelism returns a tensor that is still under way.
        outputs = torch.tensor(model(inputs()).tolist())
    content = {"adapters": adapter_state(module), "outputs": outputs, "merged": is_merged(module)}
    torch.save(content, module.out / f"{name}.pt")


class OwnSeeds(L.Callback):
    """Gives every process a seed of its own, once Lightning has given all of them one; that of the first counts."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        torch.manual_seed(trainer.global_rank)


def make(
    base: str, out: Path, tag: str, devices: int, epochs: int, checkpoint: Any = "adapter"
) -> tuple[L.Trainer, Recorded]:
    callbacks = [
        OwnSeeds(),
        AdapterCheckpoint(out / f"{tag}-directories", save_last=True, save_top_k=-1, filename="{epoch}"),
        ModelCheckpoint(out / f"{tag}-files", save_last=True, save_top_k=0),
    ]
    options: dict[str, Any] = {"max_epochs": epochs, "devices": devices, "use_distributed_sampler": False}
    # The adapters' initial values depend on it, here and in the process of the tests.
    L.seed_everything(0)
    below, module_class = BASES[base]
    strategy = PEFTStrategy(LoRA(r=2), base=below(), checkpoint=checkpoint)
    return trainer(out, strategy, callbacks=callbacks, **options), module_class(out, tag)


def run(
    out: Path,
    tag: str,
    base: str,
    devices: int,
    epochs: int,
    resume: Path | None = None,
    weights_only: bool | None = None,
) -> None:
    """Train; two devices see together the batches that one device sees alone."""
    fitted, module = make(base, out, tag, devices, epochs)
    fitted.fit(module, loader(batch_size=8), ckpt_path=resume, weights_only=weights_only)
    states = [tensor for optimizer in fitted.optimizers for s in optimizer.state.values() for tensor in s.values()]
    count = sum(local_part(tensor).numel() for tensor in states)
    (out / f"{tag}-state{fitted.global_rank}.txt").write_text(str(count))
    if base.startswith("ddp") and fitted.is_global_zero:
        record(module, module, f"{tag}-main")


def go_on(out: Path, base: str, devices: int) -> None:
    """After a fit with a merge: test as it is, test an earlier checkpoint, fit again, eject."""
    fitted, module = make(base, out, "on", devices, 2)
    originals = {name: t.clone() for name, t in module.state_dict().items()}
    losses = {}
    fitted.fit(module, loader(batch_size=8))
    losses["merged"] = fitted.test(module, loader(batch_size=16))[0]["test_loss"]
    first = out / "on-directories" / "epoch=0"
    losses["first"] = fitted.test(module, loader(batch_size=16), ckpt_path=first)[0]["test_loss"]
    fitted.fit_loop.max_epochs = 3
    fitted.fit(module, loader(batch_size=8), ckpt_path=out / "on-directories" / "last")
    eject(module)
    for name, original in originals.items():
        host = module.get_submodule(name.rpartition(".")[0])
        with gathered(host):
            assert torch.equal(whole(host.get_parameter(name.rpartition(".")[2])), original), name
    if fitted.is_global_zero:
        torch.save(losses, out / "on.pt")


def trained_whole(out: Path, base: str, devices: int) -> None:
    """Train a module whole that begins with other values on every rank, where rank 0's are to count."""
    L.seed_everything(0)
    below, module_class = BASES[base]
    module = module_class(out, "whole")
    if not base.startswith(("fsdp2", "tensor", "both")):  # whose shards are the user's, rank by rank
        with torch.no_grad():
            module.net[2].weight.add_(int(os.environ.get("LOCAL_RANK", 0)))
    strategy = PEFTStrategy(LoRA(r=2, target_modules=["net.0"]), base=below(), train_also=["net.2"])
    checkpoint = AdapterCheckpoint(out / "whole-directories", save_last=True, save_top_k=0)
    options: dict[str, Any] = {"max_epochs": 2, "devices": devices, "use_distributed_sampler": False}
    trainer(out, strategy, callbacks=[checkpoint], **options).fit(module, loader(batch_size=8))


def whole_checkpoints(out: Path, base: str, devices: int) -> None:
    """Save the frozen weights as well, go on from there, and test a checkpoint after the merge."""
    fitted, module = make(base, out, "full", devices, 2, checkpoint="full")
    fitted.fit(module, loader(batch_size=8))
    last = out / "full-files" / "last.ckpt"
    loss = fitted.test(module, loader(batch_size=16), ckpt_path=last)[0]["test_loss"]
    fitted, module = make(base, out, "full3", devices, 3, checkpoint="full")
    with torch.no_grad():
        # The checkpoint has its own.
        module.net[0].bias.add_(1.0)
    fitted.fit(module, loader(batch_size=8), ckpt_path=last)
    if fitted.is_global_zero:
        torch.save({"loss": loss}, out / "full.pt")


def evaluate(out: Path, base: str, devices: int) -> None:
    """Test and predict without training."""
    fitted, module = make(base, out, "evaluate", devices, 1)
    last = out / "two-directories" / "last"
    loss = fitted.test(module, loader(batch_size=16), ckpt_path=last)[0]["test_loss"]
    outputs = fitted.predict(module, loader(batch_size=16), ckpt_path=last)
    if fitted.is_global_zero:
        torch.save({"loss": loss, "outputs": torch.tensor(outputs[0].tolist())}, out / "evaluate.pt")


def everything(base: str, out: Path, single: Path) -> None:
    """Do on one base what the tests look at; ``single`` holds checkpoints of one process."""
    out.mkdir(exist_ok=True)
    devices = 4 if base == "both" else 2
    run(out, "two", base, devices, 2)
    run(out, "three", base, devices, 3, out / "two-directories" / "last")
    if base != "ddp_spawn":  # where every run starts processes, which do what those of "ddp_fork" do
        run(out, "file", base, devices, 3, out / "two-files" / "last.ckpt")
        run(out, "one", base, devices, 3, single / "two-directories" / "last")
    if base not in STARTED_HERE:
        go_on(out, base, devices)
        evaluate(out, base, devices)
        trained_whole(out, base, devices)
        if base not in NO_FULL_STATE:
            whole_checkpoints(out, base, devices)


def finish() -> NoReturn:
    """End this process of several."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    # Now and then a thread of torch's outlives FSDP1, and aborts the process when the interpreter ends.
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    for base in sys.argv[1].split(","):
        everything(base, Path(sys.argv[2], base), Path(sys.argv[3]))
    finish()


if __name__ == "__main__":
    main()
