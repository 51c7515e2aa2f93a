"""LightningModules and data that tests train: small and deterministic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft import LoRA, PEFTStrategy
from lightning_peft.adapters.low_rank import products
from lightning_peft.core.adapter import clean_name

# What tests train is small; it is to go the way of what is large, on one process and on several.
products._MANY_ON_CPU = 0

SAMPLES, BATCH = 16, 4
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


class Regression(pl.LightningModule):
    """An MLP with the same weights in every instance of one ``seed``, trained to give back a part of its input."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = self.build()

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, x: Tensor) -> Tensor:
        return (self(x) - x[:, :4]).square().mean()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch[0])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch[0]))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch[0]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


class LateRegression(Regression):
    """Builds its network in ``configure_model``."""

    def __init__(self) -> None:
        pl.LightningModule.__init__(self)
        self.net: nn.Module | None = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = Regression().net


class SteppedRegression(Regression):
    """Takes its batch by the number of the step, so that a resumed run sees what an uninterrupted one sees."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.global_step)
        return self.loss(torch.randn(BATCH, 8, generator=generator))

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Llama(pl.LightningModule):
    """A tiny transformers model, which ``from_pretrained`` would hand over in eval mode."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        config = {
            "vocab_size": 32,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "use_cache": False,
        }
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.model = LlamaForCausalLM(LlamaConfig(**{**config, **options})).eval()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        ids = (batch[0] * 8).long().abs() % 32
        return self.model(input_ids=ids, labels=ids).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Stop(pl.Callback):
    """Interrupts a run after ``step`` of the steps that it was to have."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        trainer.should_stop |= trainer.global_step == self.step


class Halving:
    """A scheduler that is none of torch's, such as timm's: it keeps a value for each group and sets half of it."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.values = [group["lr"] for group in optimizer.param_groups]

    def step(self, *_: Any, **__: Any) -> None:
        for group, value in zip(self.optimizer.param_groups, self.values, strict=False):
            group["lr"] = value / 2

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = state["values"]


def inputs(count: int = SAMPLES, seed: int = 3) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


def loader(count: int = SAMPLES, batch_size: int = BATCH) -> DataLoader[Any]:
    return DataLoader(TensorDataset(inputs(count)), batch_size=batch_size)


def trainer(root: Path, strategy: Any = None, **options: Any) -> pl.Trainer:
    """A silent trainer on one CPU device, by default with LoRA of rank 2."""
    if strategy is None:
        strategy = PEFTStrategy(LoRA(r=2))
    if "callbacks" not in options:
        options.setdefault("enable_checkpointing", False)
    if "max_steps" not in options:
        options.setdefault("max_epochs", 1)
    torch.manual_seed(0)
    return pl.Trainer(strategy=strategy, default_root_dir=root, **{**QUIET, **options})


def base_state(module: nn.Module) -> dict[str, Tensor]:
    """Copies of everything in the state dict that is no adapter's."""
    return {name: t.clone() for name, t in module.state_dict().items() if ".peft." not in name}


def adapter_state(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the adapters' parameters and buffers, whole, also while they are merged."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    found = {clean_name(name): t.detach() for name, t in tensors if ".peft." in name}
    return {n: t.full_tensor() if isinstance(t, DTensor) else t.clone() for n, t in found.items()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name].to_dense(), right[name].to_dense()), name


def by_hand(state: dict[str, Tensor], x: Tensor, scale: float = 8.0, seed: int = 1) -> Tensor:
    """Outputs of ``Regression`` with LoRA adapters ``state``, in plain torch (alpha 16, r 2: scale 8)."""

    def layer(number: int, x: Tensor) -> Tensor:
        base = Regression(seed).net[number]
        a, b = (state[f"net.{number}.peft.default.lora_{which}"] for which in "AB")
        return x @ (base.weight + scale * b @ a).T + base.bias

    with torch.no_grad():
        return layer(2, layer(0, x).relu())
