"""Lightning's own arguments through the strategy: a run with them is that of HF PEFT's module without the strategy."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import peft
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, GradientAccumulationScheduler
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.profilers import PassThroughProfiler
from modules import QUIET, Regression, adapter_state, inputs
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import LoRA, PEFTStrategy


class Counting(Regression):
    """Notes what Lightning asks of it, and in which modes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def train_dataloader(self) -> Any:
        self.seen.append("loader")
        return DataLoader(TensorDataset(inputs()), batch_size=4)

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(inputs(8, seed=5)), batch_size=4)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.seen.append(("train", batch_idx, self.training, torch.is_autocast_enabled("cpu")))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.seen.append(("validate", self.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        super().validation_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        # Not Adam, which makes the same steps of gradients that are clipped, and others of those that are rounded.
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.5)


class HF(Counting):
    """The same with HF PEFT's LoRA in it, which starts from ``start``."""

    def __init__(self, start: dict[str, Tensor]) -> None:
        super().__init__()
        config = peft.LoraConfig(r=2, lora_alpha=16, target_modules=["0", "2"])
        self.net = peft.inject_adapter_in_model(config, self.net)
        with torch.no_grad():
            for name, value in start.items():
                self.get_parameter(theirs(name)).copy_(value)


def theirs(name: str) -> str:
    """Return HF PEFT's name of a parameter: ``net.0.lora_A.default.weight``."""
    _, layer, _, adapter, part = name.split(".")
    return f"net.{layer}.{part}.{adapter}.weight"


class KeepStart(Callback):
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.state = adapter_state(pl_module)


class NotesSteps(PassThroughProfiler):
    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def start(self, action_name: str) -> None:
        self.steps += action_name.endswith(".training_step")


def arguments() -> dict[str, dict[str, Any]]:
    """Return what is given to the Trainer, by name; made anew for each of both runs."""
    return {
        "nothing": {},
        "no checkpoints": {"enable_checkpointing": False},
        "inference_mode": {"inference_mode": False},
        "anomalies": {"detect_anomaly": True},
        "overfitting": {"overfit_batches": 2},
        "a part of the batches": {"limit_train_batches": 3, "limit_val_batches": 1},
        "a profiler": {"profiler": NotesSteps()},
        "mixed precision": {"plugins": [MixedPrecision("bf16-mixed", "cpu")]},
        "double precision": {"precision": "64-true"},
        "sanity checks": {"num_sanity_val_steps": 2},
        "loaders anew": {"reload_dataloaders_every_n_epochs": 1},
        "no sampler of Lightning's": {"use_distributed_sampler": False},
        "clipping by norm": {"gradient_clip_val": 0.05},
        "clipping by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        "accumulation": {"accumulate_grad_batches": 3},
        "a schedule of accumulation": {"callbacks": [GradientAccumulationScheduler({0: 1, 1: 2})]},
        "validation in an epoch": {"val_check_interval": 2},
        "validation every other epoch": {"check_val_every_n_epoch": 2},
        "steps": {"max_steps": 5},
        "stopping early": {"callbacks": [EarlyStopping("val_loss", patience=1, min_delta=10.0)], "max_epochs": 6},
        "fast_dev_run": {"fast_dev_run": 2},
        "determinism": {"deterministic": True},
    }


def trained(tmp_path: Path, module: Counting, strategy: Any, name: str, *callbacks: Callback) -> pl.Trainer:
    options = {**QUIET, "max_epochs": 3, **arguments()[name]}
    options["callbacks"] = [*options.get("callbacks", ()), *callbacks]
    trainer = pl.Trainer(strategy=strategy, default_root_dir=tmp_path, **options)
    trainer.fit(module)
    return trainer


@pytest.mark.parametrize("name", arguments())
def test_a_run_is_that_of_hf_peft(tmp_path: Path, name: str) -> None:
    keep, ours = KeepStart(), Counting()
    run = trained(tmp_path, ours, PEFTStrategy(LoRA(r=2, alpha=16), merge_on_train_end=False), name, keep)
    judge = HF(keep.state)
    other = trained(tmp_path, judge, "auto", name)
    close = {"rtol": 2e-2, "atol": 1e-2} if name == "mixed precision" else {"rtol": 1e-4, "atol": 1e-6}
    for key, value in adapter_state(ours).items():
        torch.testing.assert_close(value, judge.get_parameter(theirs(key)).data, **close)
        assert not torch.equal(value, keep.state[key])
    assert ours.seen == judge.seen
    assert (run.global_step, run.current_epoch) == (other.global_step, other.current_epoch)
    for metric, value in other.callback_metrics.items():
        torch.testing.assert_close(run.callback_metrics[metric], value, **close)
    assert getattr(run.profiler, "steps", None) == getattr(other.profiler, "steps", None)


def test_a_bare_run(tmp_path: Path) -> None:
    """``barebones`` leaves out whatever costs time, and refuses what would bring it back."""
    keep, ours = KeepStart(), Counting()
    strategy = PEFTStrategy(LoRA(r=2, alpha=16), merge_on_train_end=False)
    bare: dict[str, Any] = {"barebones": True, "max_epochs": 2, "accelerator": "cpu", "devices": 1}
    pl.Trainer(strategy=strategy, default_root_dir=tmp_path, callbacks=[keep], **bare).fit(ours)
    judge = HF(keep.state)
    pl.Trainer(default_root_dir=tmp_path, **bare).fit(judge)
    assert ours.seen == judge.seen
    for key, value in adapter_state(ours).items():
        torch.testing.assert_close(value, judge.get_parameter(theirs(key)).data, rtol=1e-4, atol=1e-6)
    assert not list(tmp_path.iterdir())
