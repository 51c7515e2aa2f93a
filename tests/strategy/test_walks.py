"""How often a run walks over a model: never in a step, and as often in a save as if there were fewer layers."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_peft import LoRA, PEFTStrategy, adapter_state_dict, inject, load_adapter, save_adapter
from lightning_peft.callbacks import AdapterCheckpoint, ChangeMonitor, PEFTSummary
from lightning_peft.core.view import ModelView
from lightning_peft.storage.checkpoint_directory import AdapterDirectory

TARGETS = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
WALKS = (
    "modules",
    "parameters",
    "named_parameters",
    "buffers",
    "named_buffers",
    "state_dict",
    "train",
    "apply",
    "_apply",
)
"""Not ``named_modules``, which calls itself for every module; ``modules`` and the others call that."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Blocks(L.LightningModule):
    """Blocks of which the first two are adapted."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(count))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        for block in self.blocks:
            batch = block(batch)
        return batch.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad])


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Give a counter of what walks over a model within the context."""
    found: Counter[str] = Counter()

    def counting(name: str, function: Any) -> Any:
        @wraps(function)  # what is not torch's own would be looked into
        def count(*args: Any, **kwargs: Any) -> Any:
            found[name] += 1
            return function(*args, **kwargs)

        return count

    with pytest.MonkeyPatch.context() as patch:
        for kind, names in ((nn.Module, WALKS), (ModelView, ["__init__"])):
            for name in names:
                patch.setattr(kind, name, counting(name, getattr(kind, name)))
        yield found


class Between(L.Callback):
    """Counts in the steps from the third to the sixth, in the middle of an epoch."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, index: int) -> None:
        if index == 3:
            self.context = counted()
            self.found = self.context.__enter__()
        if index == 6:
            self.context.__exit__(None, None, None)


def fit(count: int, *callbacks: L.Callback, peft: bool = True, **options: object) -> L.Trainer:
    torch.manual_seed(0)
    method = LoRA(r=2, target_modules=TARGETS)
    trainer = L.Trainer(
        strategy=PEFTStrategy(method, merge_on_train_end=False) if peft else "auto",
        accelerator="cpu",
        devices=1,
        max_steps=8,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks],
        **{"enable_checkpointing": False, "logger": False, **options},  # type: ignore[arg-type]
    )
    trainer.fit(Blocks(count), DataLoader(torch.randn(16, 8), batch_size=2))
    return trainer


def test_the_count_sees_walks() -> None:
    model = Blocks(2)
    with counted() as found:
        list(model.parameters())
        model.state_dict()
        ModelView(model)
    assert all(found[name] for name in ("parameters", "named_parameters", "state_dict", "__init__"))
    assert "_apply" not in found


@pytest.mark.parametrize("kind", ["plain", "adapters", "callbacks"])
def test_no_step_walks_over_the_model(kind: str, tmp_path: Path) -> None:
    between = Between()
    options: dict[str, Any] = {}
    if kind == "callbacks":
        options = {"enable_checkpointing": True, "logger": CSVLogger(tmp_path)}
        fit(3, between, ChangeMonitor(every_n_steps=100), PEFTSummary(), AdapterCheckpoint(tmp_path), **options)
    else:
        fit(3, between, peft=kind != "plain")
    assert between.found == {}


@pytest.mark.parametrize("directory", [False, True])
def test_a_save_in_a_run_walks_no_more_often_if_more_layers_are_frozen(directory: bool, tmp_path: Path) -> None:
    options = {"storage_options": AdapterDirectory()} if directory else {}

    class Saves(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
            if trainer.global_step == 3:
                with counted() as calls:
                    trainer.save_checkpoint(tmp_path / str(len(found)), **options)
                found.append(calls)

    found: list[Counter[str]] = []
    for count in (3, 30):
        fit(count, Saves())
    assert len(found) == 2
    assert found[0] == found[1]
    # For what is saved, and once more when hooks of the user's have run.
    assert found[0]["__init__"] == 2
    # The names of what the optimizer holds.
    assert found[0]["named_parameters"] == 1


def test_saving_and_loading_look_at_a_model_once_however_many_layers_are_frozen(tmp_path: Path) -> None:
    found = []
    for count in (3, 30):
        model = Blocks(count)
        inject(model, LoRA(r=2, target_modules=TARGETS))
        path = tmp_path / str(count)
        with counted() as state:
            adapter_state_dict(model)
        with counted() as saving:
            save_adapter(model, path)
        with counted() as loading:
            load_adapter(model, path)
        found.append((state, saving, loading))
    assert found[0] == found[1]
    assert [calls["__init__"] for calls in found[0]] == [1, 1, 1]
