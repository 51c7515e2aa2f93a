"""Starts from a model without weights on two processes and measures memory: ``meta_script.py BASE WEIGHTS OUT``."""

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from distributed_script import CPUFSDPStrategy, finish, parallel
from modules import adapter_state, trainer
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lightning_peft import LoRA, PEFTStrategy
from lightning_peft.callbacks import AdapterCheckpoint

CONFIG: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}


class Peak:
    """The most memory that this process allocated inside, beyond what it had before. Mapped files do not count."""

    def __enter__(self) -> "Peak":
        self.before, self.highest, self.over = self.now(), 0, False
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.over:
            self.highest = max(self.highest, self.now() - self.before)
            time.sleep(0.001)

    def __exit__(self, *_: object) -> None:
        self.over = True
        self.thread.join()

    @staticmethod
    def now() -> int:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
        return int(line.split()[1]) * 1024


class Late(L.LightningModule):
    """Builds its model without weights and shards it."""

    def __init__(self, base: str, out: Path) -> None:
        super().__init__()
        self.base, self.out = base, out
        self.model: Any = None

    def configure_model(self) -> None:
        if self.model is not None:
            return
        with self.trainer.init_module(empty_init=True):
            self.model = LlamaForCausalLM(LlamaConfig(**CONFIG))
        self.trainer.strategy.inject()
        if self.base == "fsdp2":
            for part in (*self.model.model.layers, self.model.model.embed_tokens, self.model.lm_head, self.model):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, use_cache=False).logits

    def training_step(self, ids: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.model(input_ids=ids, labels=ids, use_cache=False).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_train_start(self) -> None:
        with torch.no_grad():
            logits = self.trainer.strategy.model(torch.arange(12)[None])
        torch.save({"logits": logits, "adapters": adapter_state(self)}, self.out / f"start-{self.global_rank}.pt")


def main() -> None:
    base, weights, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    L.seed_everything(0)
    below = (
        CPUFSDPStrategy(auto_wrap_policy={LlamaDecoderLayer, torch.nn.Embedding}) if base == "fsdp" else parallel(2, 1)
    )
    fitted = trainer(
        out,
        PEFTStrategy(LoRA(r=2), base=below, base_weights=weights),
        devices=2,
        max_steps=1,
        callbacks=[AdapterCheckpoint(out / "checkpoints", save_last=True)],
    )
    module = Late(base, out)
    strategy, sizes = fitted.strategy, {}
    setup, save = strategy.setup, strategy.save_checkpoint

    def measured_setup(*args: Any) -> None:
        with Peak() as peak:
            setup(*args)
        sizes["setup"] = peak.highest

    def measured_save(*args: Any, **kwargs: Any) -> None:
        with Peak() as peak:
            save(*args, **kwargs)
        sizes["save"] = peak.highest

    strategy.setup, strategy.save_checkpoint = measured_setup, measured_save
    fitted.fit(module, DataLoader(torch.randint(0, 4096, (2, 8)), batch_size=1))
    torch.save(sizes, out / f"sizes-{os.environ.get('LOCAL_RANK', 0)}.pt")
    finish()


if __name__ == "__main__":
    main()
