"""What does the strategy add to a step, beside HF peft called in `configure_model` under stock Lightning?"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import peft
import torch
from torch.utils.data import DataLoader

from benchmarks import measure, subjects
from benchmarks.checkpoints import QUIET, Module
from benchmarks.report import Options, Table, answer
from lightning_peft import LoRA, PEFTStrategy


class Diy(Module):
    """What users write: HF peft in `configure_model`."""

    def configure_model(self) -> None:
        if not hasattr(self.model, "peft_config"):
            config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=list(subjects.LLAMA_TARGETS))
            self.model = peft.get_peft_model(self.model, config)


class Periods(pl.Callback):
    """Times from the start of one batch to the start of the next."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.starts.append(time.perf_counter())

    def median(self) -> float:
        periods = [after - before for before, after in zip(self.starts, self.starts[1:], strict=False)]
        return statistics.median(periods[1:])


def period(module: pl.LightningModule, data: DataLoader[Any], steps: int, strategy: Any) -> Mapping[str, float]:
    """Return the median time of a whole step of the training loop."""
    periods = Periods()
    with tempfile.TemporaryDirectory() as folder:
        options = {**QUIET, "max_steps": steps, "strategy": strategy, "callbacks": [periods]}
        pl.Trainer(default_root_dir=folder, **options).fit(module, data)
    return {"step": periods.median()}


def main(options: Options) -> list[Table]:
    """Time steps of the training loop."""
    layers, tokens, steps = (1, 16, 6) if options.quick else (4, 64, 8)
    data = DataLoader(torch.randint(0, 1000, (4 * steps, tokens)), batch_size=4)
    cases: dict[str, measure.Timed] = {
        "HF peft in configure_model": lambda: period(Diy(layers), data, steps, "auto"),
        "PEFTStrategy(LoRA())": lambda: period(
            Module(layers), data, steps, PEFTStrategy(LoRA(r=8), merge_on_train_end=False)
        ),
    }
    rounds = measure.in_turns(cases, options.rounds)
    table = Table("strategy", f"A step of the training loop, {layers} layers of SmolLM2", ["variant", "step / HF peft"])
    for name in cases:
        table.rows.append([name, measure.ratios(rounds, name, "HF peft in configure_model", "step")])
    return [table]


if __name__ == "__main__":
    answer(main)
