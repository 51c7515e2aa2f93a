"""Shards a model over two processes with plain torch and writes down what each holds: ``shard_script.py OUT``."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lightning_peft import LoRA, inject
from lightning_peft.core.view import ModelView

CONFIG = LlamaConfig(
    vocab_size=500, hidden_size=64, intermediate_size=172, num_hidden_layers=3, num_attention_heads=4, use_cache=False
)
COLUMNS, ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")
DEVICE = torch.device("cpu")


def build() -> nn.Module:
    model = LlamaForCausalLM(CONFIG)
    inject(model, LoRA(r=4))
    return model


def held(model: nn.Module) -> dict[str, int]:
    """Bytes of this process's part of the parameters, frozen (with buffers) and trained."""
    found = {"frozen": sum(b.numel() * b.element_size() for b in model.buffers()), "trained": 0}
    for parameter in model.parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        found["trained" if parameter.requires_grad else "frozen"] += local.numel() * local.element_size()
    return found


def fsdp1(sharding: ShardingStrategy) -> dict[str, int]:
    model = build()
    wrapped = FullyShardedDataParallel(
        model,
        sharding_strategy=sharding,
        auto_wrap_policy=ModuleWrapPolicy({LlamaDecoderLayer}),
        ignored_modules=[slot for _, _, slot in ModelView(model).slots],
        use_orig_params=True,
        device_id=DEVICE,
    )
    units = FullyShardedDataParallel.fsdp_modules(wrapped)
    found = {**held(wrapped), "gathered": 0}

    def look(*_: Any) -> None:
        flat = [unit._handle.flat_param for unit in units if unit._handle is not None]
        whole = [f._full_param_padded.untyped_storage().nbytes() for f in flat if hasattr(f, "_full_param_padded")]
        found["gathered"] = max(found["gathered"], sum(whole))

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(look)
            module.register_full_backward_hook(look)
    for _ in range(2):
        wrapped(input_ids=torch.zeros(1, 8, dtype=torch.long)).logits.sum().backward()
    return found


def fsdp2() -> dict[str, int]:
    model = build()
    for layer in model.model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    return held(model)


def tensor_parallel() -> dict[str, int]:
    model = LlamaForCausalLM(CONFIG).requires_grad_(False)
    styles = {**dict.fromkeys(COLUMNS, ColwiseParallel), **dict.fromkeys(ROWS, RowwiseParallel)}
    for layer in model.model.layers:
        plan = {n: styles[n.rsplit(".", 1)[-1]]() for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
        parallelize_module(layer, init_device_mesh("cpu", (2,)), plan)
    return held(model)


def work(rank: int, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
    found = {
        "FULL_SHARD": fsdp1(ShardingStrategy.FULL_SHARD),
        "SHARD_GRAD_OP": fsdp1(ShardingStrategy.SHARD_GRAD_OP),
        "NO_SHARD": fsdp1(ShardingStrategy.NO_SHARD),
        "fsdp2": fsdp2(),
        "tensor": tensor_parallel(),
    }
    Path(out, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.start_processes(work, args=(sys.argv[1],), nprocs=2, start_method="fork")
