"""What training a transformers model on two processes comes to, on one base strategy after the other.

For every feature of training, the gradients of the adapters in the first step, and the adapters after three; of a plain
run also what a server was sent.
``features_script.py BASES OUT``, with commas between names; each base has a folder of its name in ``OUT``.
"""

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from distributed_script import CPUFSDPStrategy, finish, parallel
from fake_server import serving, url
from modules import Llama, adapter_state, loader, trainer
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lightning_peft import LoRA, PEFTStrategy
from lightning_peft.callbacks import HotSwap
from lightning_peft.core.view import ModelView
from lightning_peft.tensors.sharding import whole

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {},
    "reentrant": {},
    "accumulation": {"accumulate_grad_batches": 2},
    "clipping": {"gradient_clip_val": 0.01},
    "compiled": {},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
}


class Recorded(Llama):
    """Takes its share of the batch, and writes down its gradients and what is learnt."""

    def __init__(self, out: Path, base: str, feature: str) -> None:
        # Keys for each of two processes.
        super().__init__(num_key_value_heads=2)
        self.out, self.base, self.feature, self.calls = out, base, feature, 0
        if feature == "reentrant" or (feature == "checkpointing" and base != "fsdp"):
            self.model.gradient_checkpointing_enable({"use_reentrant": feature == "reentrant"})
        # An early part of the layer: recomputation stops at the last activation that is needed.
        self.model.model.layers[0].input_layernorm.register_forward_hook(self.count)

    def count(self, *_: Any) -> None:
        self.calls += 1

    def configure_model(self) -> None:
        layers = self.model.model.layers
        if self.base == "fsdp2" and not isinstance(self.model, FSDPModule):
            self.trainer.strategy.inject()
            for part in (*layers, self.model):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])
        if self.base == "tensor" and not isinstance(layers[0].mlp.up_proj.weight, DTensor):
            columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
            plan = {name: ColwiseParallel() for name in columns}
            plan |= {name: RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
            for layer in layers:
                parallelize_module(layer, self.device_mesh["tensor_parallel"], plan)
        if self.feature == "compiled" and self.base in ("fsdp2", "tensor"):
            # Lightning takes a module compiled as a whole on the other strategies.
            for layer in layers:
                layer.compile(backend="eager")

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        rank, count = (0, 1) if self.base == "tensor" else (self.global_rank, self.trainer.world_size)
        return super().training_step([batch[0][rank::count]], batch_idx)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.global_step == 0 and self.feature != "clipping":
            self.record_gradients()

    def on_before_zero_grad(self, optimizer: Any) -> None:
        # After clipping, which comes after on_before_optimizer_step.
        if self.global_step == 1 and self.feature == "clipping":
            self.record_gradients()

    def record_gradients(self) -> None:
        parameters = ModelView(self).adapter_parameters
        grads = {name: whole(p.grad).clone() for name, p in parameters.items()}
        content = {"grads": grads, "calls": self.calls, "dtypes": sorted({str(p.dtype) for p in parameters.values()})}
        torch.save(content, self.out / f"{self.feature}-{self.global_rank}.pt")

    def on_train_end(self) -> None:
        torch.save(adapter_state(self), self.out / f"{self.feature}-{self.global_rank}-end.pt")


def strategy(base: str, feature: str) -> Any:
    if base == "fsdp":
        checkpointed = {LlamaDecoderLayer} if feature == "checkpointing" else None
        return CPUFSDPStrategy(auto_wrap_policy={LlamaDecoderLayer}, activation_checkpointing_policy=checkpointed)
    return {"fsdp2": lambda: parallel(2, 1), "tensor": lambda: parallel(1, 2)}.get(base, lambda: base)()


def run(out: Path, base: str, feature: str, devices: int) -> None:
    L.seed_everything(0)
    module: nn.Module = Recorded(out, base, feature)
    options: dict[str, Any] = {
        "max_epochs": 1,
        "use_distributed_sampler": False,
        "devices": devices,
        **FEATURES[feature],
    }
    fitted = trainer(out, PEFTStrategy(LoRA(r=2), base=strategy(base, feature)), **options)
    if feature == "compiled" and base not in ("fsdp2", "tensor"):
        module = torch.compile(module, backend="eager")
    data = loader(count=24, batch_size=4 if feature == "accumulation" else 8)
    if feature != "plain":
        fitted.fit(module, data)
        return
    # Each process has a server of its own, and the first one's alone is to hear of adapters.
    with serving() as server:
        fitted.callbacks.append(HotSwap(url(server), "policy", str(out / "sent")))  # type: ignore[attr-defined]
        fitted.fit(module, data)
    torch.save({"calls": server.calls, "loaded": server.loaded}, out / f"served-{fitted.global_rank}.pt")


def main() -> None:
    for base in sys.argv[1].split(","):
        out = Path(sys.argv[2], base)
        out.mkdir(exist_ok=True)
        for feature in FEATURES:
            run(out, base, feature, 2)
        # What is compiled for one base is of no use to another, and torch compiles a function a few times only.
        torch.compiler.reset()
    finish()


if __name__ == "__main__":
    main()
