"""Trains every kind of method on two processes and leaves what each ended with.

``methods_script.py OUT BASES METHODS``, the last two with commas between names.
"""

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
import transformers as t
from distributed_script import CPUFSDPStrategy, finish, parallel
from families import SMALL
from lightning.pytorch.strategies import Strategy
from modules import loader, trainer
from torch import Tensor, nn
from torch.distributed import fsdp

from lightning_peft import (
    IA3,
    BitFit,
    Compacter,
    DoRA,
    LoHa,
    ParallelAdapter,
    PEFTMethod,
    PEFTStrategy,
    SeriesAdapter,
    VeRA,
)
from lightning_peft.callbacks import AdapterCheckpoint
from lightning_peft.operations.merge import is_merged
from lightning_peft.storage.state import adapter_state_dict
from lightning_peft.tensors.sharding import map_tensors, whole

METHODS: dict[str, PEFTMethod] = {
    "dora": DoRA(r=2),
    "vera": VeRA(r=6, d_initial=1.0),
    "loha": LoHa(r=2),
    "ia3": IA3(),
    "compacter": Compacter(bottleneck=8),
    "houlsby": SeriesAdapter(bottleneck=4),
    "pfeiffer": SeriesAdapter(bottleneck=4, preset="pfeiffer"),
    "parallel": ParallelAdapter(bottleneck=4),
    "bitfit": BitFit(),
}


def bert() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        # Weights of the usual size would make models this small so flat that no method could do anything.
        config = t.BertConfig(**SMALL, initializer_range=0.2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        return t.BertForSequenceClassification(config)


def ids(numbers: Tensor) -> Tensor:
    return (numbers * 10).long().abs() % 50


class Classifier(L.LightningModule):
    """Learns which of the first two tokens is larger; each rank takes its share of the global batch."""

    def __init__(self, out: Path, tag: str, base: str) -> None:
        super().__init__()
        self.model = bert()
        self.out, self.tag, self.base = out, tag, base

    def configure_model(self) -> None:
        if not self.base.startswith("fsdp2") or isinstance(self.model, fsdp.FSDPModule):
            return
        if self.base == "fsdp2":
            self.trainer.strategy.inject()
        mesh = self.device_mesh["data_parallel"]
        for layer in self.model.bert.encoder.layer:
            fsdp.fully_shard(layer, mesh=mesh)
        fsdp.fully_shard(self.model, mesh=mesh)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        tokens = ids(batch[0][self.global_rank :: self.trainer.world_size])
        return self.model(input_ids=tokens, labels=(tokens[:, 0] > tokens[:, 1]).long()).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def on_fit_end(self) -> None:
        model = self.trainer.strategy.model
        with torch.no_grad():
            logits = model(ids(next(iter(loader()))[0]))
        content = {"adapters": map_tensors(dict(adapter_state_dict(self)), whole), "logits": logits}
        torch.save({**content, "merged": is_merged(self)}, self.out / f"{self.tag}-rank{self.global_rank}.pt")

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.eval()(input_ids=tokens).logits


def make_base(base: str) -> Strategy | str:
    if base == "fsdp":
        return CPUFSDPStrategy(auto_wrap_policy={t.models.bert.modeling_bert.BertLayer})
    return parallel(2, 1) if base.startswith("fsdp2") else base


def run(out: Path, tag: str, name: str, base: str, devices: int, epochs: int, resume: Path | None = None) -> None:
    L.seed_everything(0)
    callback = AdapterCheckpoint(out / f"{tag}-saved", save_last=True, save_top_k=0)
    strategy = PEFTStrategy(METHODS[name], base=make_base(base))
    options: dict[str, Any] = {"max_epochs": epochs, "devices": devices, "use_distributed_sampler": False}
    fitted = trainer(out, strategy, callbacks=[callback], **options)
    fitted.fit(Classifier(out, tag, base), loader(batch_size=8), ckpt_path=resume)


def main() -> None:
    out, bases, names = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3].split(",")
    for base in bases:
        for name in names:
            run(out, f"{base}-{name}-two", name, base, 2, 2)
            run(out, f"{base}-{name}-three", name, base, 2, 3, out / f"{base}-{name}-two-saved" / "last")
    finish()


if __name__ == "__main__":
    main()
