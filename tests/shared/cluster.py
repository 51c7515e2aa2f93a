"""A run of the command, small enough for tests of launchers, and callbacks that its config names.

Every token is one character and all examples are equally long, so that the mean of two processes' losses is the loss
of one process on the same global batch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import transformers as t
import yaml
from network import wait_for
from tokenizers import Tokenizer, models, pre_tokenizers

from lightning_peft import adapter_state_dict
from lightning_peft.cli import PEFTCLI

CHARACTERS = "0123456789?"


class Record(pl.Callback):
    """Every rank writes its adapters to a directory when fit has ended."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        torch.save(adapter_state_dict(pl_module), self.path / f"rank{trainer.global_rank}.pt")


class Hold(pl.Callback):
    """Every rank stops before a step, says so in a file, and goes on when there is the file ``go``."""

    def __init__(self, path: str, step: int) -> None:
        self.path, self.step = Path(path), step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not (self.path / "go").exists():
            (self.path / f"waits{trainer.global_rank}").touch()
            wait_for((self.path / "go").exists, "the file go")


def model_and_data(folder: Path) -> None:
    """Write what ``config`` names: a random Llama with its tokenizer, and questions."""
    _language_model(folder / "model")
    _questions(folder / "questions.jsonl")


def _language_model(path: Path) -> None:
    vocabulary = {token: number for number, token in enumerate(["<eos>", *CHARACTERS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    t.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>").save_pretrained(path)
    config = t.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        t.LlamaForCausalLM(config).save_pretrained(path)


def _questions(path: Path, count: int = 24) -> None:
    """Write examples of equal length."""
    rows = [{"prompt": f"{number:02d}?", "answer": f"{number * 7 % 100:02d}"} for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def config(folder: Path, *, nodes: int, batch: int, out: Path, hold: int | None = None) -> Path:
    """Write a run's config into ``out``: 5 steps with a checkpoint after every other one, in epochs of 3 steps.

    Args:
        folder: Holds the model and the questions.
        nodes: Of one process each.
        batch: Examples per process.
        out: Gets the checkpoints and what the ranks record.
        hold: The step before which the ranks wait for the file ``go``.
    """
    saver = {"dirpath": str(out / "checkpoints"), "save_last": True, "save_top_k": 0, "every_n_train_steps": 2}
    callbacks = [
        {"class_path": "lightning_peft.callbacks.AdapterCheckpoint", "init_args": saver},
        {"class_path": "cluster.Record", "init_args": {"path": str(out)}},
    ]
    if hold is not None:
        callbacks.append({"class_path": "cluster.Hold", "init_args": {"path": str(out), "step": hold}})
    trainer = {
        "accelerator": "cpu",
        "devices": 1,
        "num_nodes": nodes,
        "strategy": "peft_lora_ddp" if nodes > 1 else "peft_lora",
        "max_steps": 5,
        "logger": False,
        "enable_progress_bar": False,
        "default_root_dir": str(out),
        "callbacks": callbacks,
    }
    data = {"train_file": str(folder / "questions.jsonl"), "batch_size": batch}
    content = {
        "seed_everything": 0,
        "trainer": trainer,
        "model": {"class_path": "lightning_peft.tasks.CausalLM", "init_args": {"model": str(folder / "model")}},
        "data": {"class_path": "lightning_peft.tasks.InstructionData", "init_args": data},
        # Plain SGD: the division of Adam would blow up the rounding of averaged gradients.
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}},
    }
    out.mkdir(parents=True)
    (out / "run.yaml").write_text(yaml.safe_dump(content))
    return out / "run.yaml"


def run_alone(run: Path, *arguments: str) -> None:
    """Run the command of a config in this process."""
    PEFTCLI(["fit", f"--config={run}", *arguments])
