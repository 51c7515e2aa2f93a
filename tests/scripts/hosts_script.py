"""Trains what is read or shared in ways of its own on two processes, on one base strategy after the other.

``hosts_script.py OUT`` leaves what each rank saw there, by base and cell.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed_script
import lightning as L
import torch
from deltas_script import Words
from distributed_script import CPUFSDPStrategy, Recorded, finish, parallel
from lightning.pytorch.callbacks import ModelCheckpoint
from modules import loader, trainer
from torch import Tensor, nn
from torch.distributed import fsdp
from transformers import MixtralConfig, MixtralForCausalLM

from lightning_peft import Compacter, LoRA, NewTokens, PEFTMethod, PEFTStrategy, VeRA, adapter_state_dict, unmerge
from lightning_peft.callbacks import AdapterCheckpoint
from lightning_peft.operations.merge import is_merged
from lightning_peft.operations.shards import gathered
from lightning_peft.tensors.sharding import map_tensors, whole

BOTH: dict[str, Any] = {"target_modules": ["net.0", "net.2"]}


class Layers(nn.Module):
    """Two layers of attention, whose projections are read without being called."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None] * torch.arange(1.0, 4.0)[:, None]
        for layer in self.layers:
            x = x + layer(x, x, x, need_weights=False)[0]
        return self.head(x.mean(1))


class Attention(Recorded):
    def build(self) -> nn.Module:
        return Layers()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Experts(nn.Module):
    """Three of them in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 16, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("be,eoi,bi->bo", x[:, :3].softmax(-1), self.up, x)


class Mixture(Recorded):
    def build(self) -> nn.Module:
        return nn.Sequential(Experts(), nn.ReLU(), nn.Linear(16, 4))


class Mixtral(Recorded):
    """Experts of transformers'."""

    def build(self) -> nn.Module:
        sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
        return MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=2, initializer_range=0.5))

    def loss(self, x: Tensor) -> Tensor:
        ids = (x * 3).long().abs() % 8
        return self.net(input_ids=ids, labels=ids).loss


def sharded(kind: type[Recorded], early: bool) -> type[Recorded]:
    """Return ``kind`` cut up by FSDP2 as one unit, adapters included if ``early``."""

    class Sharded(kind):  # type: ignore[misc, valid-type]
        def configure_model(self) -> None:
            if not isinstance(self.net, fsdp.FSDPModule):
                if early:
                    self.trainer.strategy.inject()
                fsdp.fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    return Sharded


CELLS: dict[str, tuple[type[Recorded], PEFTMethod]] = {
    "attention": (Attention, LoRA(r=2, target_modules=["net.layers.0", "net.layers.1"])),
    "experts": (Mixture, LoRA(r=2, target_modules=["net.0.up", "net.2"])),
    "mixtral": (Mixtral, LoRA(r=2, target_modules=["experts.down_proj", "experts.gate_up_proj"])),
    "vera": (Recorded, VeRA(r=2, d_initial=1.0, **BOTH)),
    "compacter": (Recorded, Compacter(bottleneck=4, train_norms=False, **BOTH)),
    "new_tokens": (Words, NewTokens(token_indices=[1, 2, 9], target_modules=["net.0"])),
}
BASES: dict[str, Callable[[], Any]] = {
    "fsdp": CPUFSDPStrategy,
    "fsdp2": lambda: parallel(2, 1),
    "fsdp2_late": lambda: parallel(2, 1),
    "stage1": lambda: deepspeed_script.base(1),
    "stage3": lambda: deepspeed_script.base(3),
}
REFUSED = {("stage3", "mixtral")}


def make(out: Path, base: str, cell: str, epochs: int) -> tuple[L.Trainer, Recorded]:
    kind, method = CELLS[cell]
    if base.startswith("fsdp2"):
        kind = sharded(kind, early=base == "fsdp2")
    callbacks = [
        AdapterCheckpoint(out / f"{base}-{cell}-{epochs}-directories", save_last=True, save_top_k=0),
        ModelCheckpoint(out / f"{base}-{cell}-{epochs}-files", save_last=True, save_top_k=0),
    ]
    L.seed_everything(0)
    strategy = PEFTStrategy(method, base=BASES[base]() if base in BASES else "auto")
    options: dict[str, Any] = {"devices": 2 if base in BASES else 1, "use_distributed_sampler": False}
    fitted = trainer(out, strategy, max_epochs=epochs, callbacks=callbacks, **options)
    module = kind(out, cell)
    module.on_fit_end = lambda: None  # type: ignore[method-assign]
    return fitted, module


def run(out: Path, base: str, cell: str) -> dict[str, Any]:
    """Train, test with that trainer and with another, unmerge, and go on from what was saved."""
    fitted, module = make(out, base, cell, 2)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fitted.fit(module, loader(batch_size=8))
    seen: dict[str, Any] = {"adapters": adapters(module), "merged": is_merged(module)}
    again, fresh = make(out, base, cell, 2)
    last = out / f"{base}-{cell}-2-directories" / "last"
    losses = [
        fitted.test(module, loader(batch_size=16), verbose=False),
        fitted.test(module, loader(batch_size=16), ckpt_path=last, verbose=False),
        again.test(fresh, loader(batch_size=16), ckpt_path=last, verbose=False),
    ]
    seen["losses"] = [loss["test_loss"] for (loss,) in losses]
    unmerge(module)
    seen["base is back"] = all(torch.equal(weight(module, name), value) for name, value in before.items())
    for kind in ("directories/last", "files/last.ckpt"):
        resumed, module = make(out, base, cell, 3)
        resumed.fit(module, loader(batch_size=8), ckpt_path=out / f"{base}-{cell}-2-{kind}")
        seen[kind.partition("/")[0]] = adapters(module)
    return seen


def adapters(module: nn.Module) -> dict[str, Tensor]:
    return map_tensors(dict(adapter_state_dict(module)), lambda tensor: whole(tensor).clone())


def weight(module: nn.Module, name: str) -> Tensor:
    host = module.get_submodule(name.rpartition(".")[0])
    with gathered(host):
        return whole(module.get_parameter(name)).clone()


def main() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    out = Path(sys.argv[1])
    seen: dict[str, dict[str, Any]] = {base: {} for base in BASES}
    for base in BASES:
        for cell in CELLS:
            if (base, cell) in REFUSED:
                fitted, module = make(out, base, cell, 2)
                seen[base][cell] = deepspeed_script.error(lambda f=fitted, m=module: f.fit(m, loader(batch_size=8)))  # type: ignore[misc]
            else:
                seen[base][cell] = run(out, base, cell)
    torch.save(seen, out / f"rank{torch.distributed.get_rank()}.pt")
    finish()


if __name__ == "__main__":
    main()
