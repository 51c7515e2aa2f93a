"""How large is a checkpoint, does saving it touch the frozen weights, and what do the hashes in its manifest cost?"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from benchmarks import measure, subjects
from benchmarks.report import MB, Options, Table, answer
from lightning_peft import LoRA, PEFTStrategy, inject, load_adapter, save_adapter

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "max_steps": 1,
}
ALL = ("q", "k", "v", "o", "gate", "up", "down")


class Module(pl.LightningModule):
    """A causal language model on random tokens."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.model = LlamaForCausalLM(subjects.smollm2_config(layers))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def file_size(layers: int, folder: Path, **options: Any) -> int:
    """Train for a step and return the bytes of the checkpoint, optimizer state included."""
    trainer = pl.Trainer(default_root_dir=folder, **QUIET, **options)
    trainer.fit(Module(layers), DataLoader(torch.randint(0, 1000, (1, 16)), batch_size=1))
    trainer.save_checkpoint(folder / "a.ckpt")
    return (folder / "a.ckpt").stat().st_size


def lora_parameters(layers: dict[str, tuple[int, int]], targets: tuple[str, ...], depth: int, r: int) -> int:
    """Return Σ r (in + out) over the targets of ``depth`` layers with linear layers ``(in, out)``."""
    return depth * sum(r * sum(layers[target]) for target in targets)


def llama_layers(size: str) -> dict[str, tuple[int, int]]:
    config = subjects.llama_config(size)
    hidden, inner = config.hidden_size, config.intermediate_size
    narrow = hidden // config.num_attention_heads * config.num_key_value_heads
    attention = {"q": (hidden, hidden), "k": (hidden, narrow), "v": (hidden, narrow), "o": (hidden, hidden)}
    return {**attention, "gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden)}


def llama_parameters(size: str) -> int:
    """Return the number of parameters of Llama 2, by formula: embedding and head, layers, norms."""
    config = subjects.llama_config(size)
    linear = sum(d_in * d_out for d_in, d_out in llama_layers(size).values())
    hidden, depth = config.hidden_size, config.num_hidden_layers
    return 2 * config.vocab_size * hidden + depth * (linear + 2 * hidden) + hidden


def analytic() -> list[list[Any]]:
    """Return model, adapter, its parameters, MiB in 16 bits, and how many times smaller it is than the weights."""
    # The paper rounds the weights of GPT-3 to 350 GB (arXiv:2106.09685, section 4.2).
    gpt3 = {"q": (12288, 12288), "v": (12288, 12288)}
    rows = [("GPT-3 175B", "r = 4 on q, v", lora_parameters(gpt3, ("q", "v"), 96, 4), 350e9)]
    for size in ("7B", "70B"):
        depth = subjects.llama_config(size).num_hidden_layers
        for label, targets in (("r = 8 on q, v", ("q", "v")), ("r = 8 on all linear layers", ALL)):
            count = lora_parameters(llama_layers(size), targets, depth, 8)
            rows.append((f"Llama-{size}", label, count, 2.0 * llama_parameters(size)))
    return [[model, label, count, 2 * count / 2**20, weights / (2 * count)] for model, label, count, weights in rows]


def beside_frozen(layers: int) -> nn.Module:
    """Return a model with one adapter and ``layers`` frozen layers beside it."""
    model = nn.ModuleDict({"adapted": nn.Linear(1024, 1024), "frozen": nn.ModuleList()})
    model["frozen"].extend(nn.Linear(1024, 1024) for _ in range(layers))
    inject(model, LoRA(r=8, target_modules="adapted"))
    return model


def saving_memory(model: nn.Module, path: Path) -> int:
    """Return the bytes that saving the adapter of ``model`` allocates."""
    return measure.peak_bytes(lambda: save_adapter(model, path))


def manifests(folder: Path, options: Options) -> Table:
    """Measure saving an adapter with its manifest against saving it without, and loading it likewise."""
    table = Table("manifest", "An adapter with its manifest, against one without", ["adapter, MB", "save", "load"])
    for rank in (64,) if options.quick else (64, 1024):
        model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8)))
        inject(model, LoRA(r=rank))
        sealed, bare = folder / f"sealed {rank}", folder / f"bare {rank}"

        def without(model: nn.Module = model, path: Path = bare) -> None:
            with patch("lightning_peft.storage.saving.write_manifest"):
                save_adapter(model, path)

        writing = {
            "with": lambda model=model, path=sealed: {"s": measure.seconds(lambda: save_adapter(model, path))},
            "without": lambda run=without: {"s": measure.seconds(run)},
        }
        saved = measure.in_turns(writing, 4 * options.rounds)
        reading = {
            name: lambda model=model, path=path: {"s": measure.seconds(lambda: load_adapter(model, path))}
            for name, path in (("with", sealed), ("without", bare))
        }
        loaded = measure.in_turns(reading, 4 * options.rounds)
        size = (sealed / "adapter_model.safetensors").stat().st_size / MB
        table.rows.append([size, *(measure.ratios(rounds, "with", "without", "s") for rounds in (saved, loaded))])
    return table


class Saves(pl.Callback):
    """Saves after every batch, and notes the milliseconds of the process that it takes."""

    def __init__(self, path: Path) -> None:
        self.path, self.taken = path, list[float]()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        start = time.process_time()
        trainer.save_checkpoint(self.path)
        self.taken.append(1e3 * (time.process_time() - start))


class Narrow(Module):
    """Layers so small that reading their weights takes no time, of which the first four are adapted."""

    def __init__(self, layers: int) -> None:
        pl.LightningModule.__init__(self)
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(layers)))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layers(batch).square().mean()


ADAPTED = [f"layers.{layer}.0" for layer in range(4)]


def of_the_process(layers: int, folder: Path, rounds: int) -> dict[str, float]:
    """Return the milliseconds of the process that saving and loading take beside ``layers`` layers: medians."""
    saves, method = Saves(folder / "a.ckpt"), LoRA(r=8, target_modules=ADAPTED)
    options = {**QUIET, "max_steps": rounds + 2, "callbacks": [saves]}
    trainer = pl.Trainer(default_root_dir=folder, strategy=PEFTStrategy(method, merge_on_train_end=False), **options)
    trainer.fit(Narrow(layers), DataLoader(torch.randn(4 * rounds + 8, 8), batch_size=4))
    model = Narrow(layers)
    inject(model, method)
    found = {"a checkpoint in a run": statistics.median(saves.taken[2:])}
    for what, run in (
        ("`save_adapter`", lambda: save_adapter(model, folder / "adapter")),
        ("`load_adapter`", lambda: load_adapter(model, folder / "adapter")),
    ):
        taken = []
        for _ in range(rounds):
            start = time.process_time()
            run()
            taken.append(1e3 * (time.process_time() - start))
        found[what] = statistics.median(taken)
    return found


def growth(folder: Path, options: Options) -> Table:
    """Measure how saving and loading grow with the number of frozen layers."""
    few, many = (60, 120) if options.quick else (60, 600)
    table = Table(
        "growth",
        "Saving and loading with more frozen layers (time of the process)",
        ["what", f"{few} layers, ms", f"{many} layers, ms", "ratio"],
    )
    small, large = (of_the_process(layers, folder, 4 * options.rounds) for layers in (few, many))
    table.rows = [[what, small[what], large[what], large[what] / small[what]] for what in small]
    table.notes.append(
        "One look at every module is needed, to see what is adapted, has changed or is new, and a checkpoint in a run "
        "reads every frozen weight once, to tell if something has written to it."
    )
    return table


def main(options: Options) -> list[Table]:
    """Measure checkpoints."""
    layers = 2 if options.quick else 8
    sizes = Table("checkpoints", "Checkpoints with optimizer state, MB", ["model", "full", "adapter", "ratio"])
    formula = Table("analytic", "By formula, in 16 bits", ["model", "adapter", "parameters", "MiB", "times smaller"])
    formula.rows = analytic()
    saving = Table("saving", "Saving one adapter beside a base ten times larger", ["what", "ratio"])
    with tempfile.TemporaryDirectory() as folder:
        full = file_size(layers, Path(folder))
        adapter = file_size(layers, Path(folder), strategy=PEFTStrategy(LoRA(r=8)))
        sizes.rows.append(
            [f"SmolLM2, {layers} layers, r = 8 on all linear layers", full / MB, adapter / MB, full / adapter]
        )
        small, large = beside_frozen(3), beside_frozen(39)
        path = Path(folder) / "adapter"
        cases = {
            name: lambda model=model: {"save": measure.seconds(lambda: save_adapter(model, path))}
            for name, model in (("small", small), ("large", large))
        }
        rounds = measure.in_turns(cases, 4 * options.rounds)
        saving.rows.append(["time", measure.ratios(rounds, "large", "small", "save")])
        saving.rows.append(["memory", (1 + saving_memory(large, path)) / (1 + saving_memory(small, path))])
        hashes, growing = manifests(Path(folder), options), growth(Path(folder), options)
    return [sizes, formula, saving, growing, hashes]


if __name__ == "__main__":
    answer(main)
