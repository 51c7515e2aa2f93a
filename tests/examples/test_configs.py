"""Every config of the examples goes through the real parser; what has a part that runs on a CPU trains a step."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from cluster import model_and_data
from jsonargparse import Namespace
from launch import clean_environment
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from read_config import CONFIGS, Read
from safetensors import safe_open

from lightning_peft import LoRA, PEFTStrategy
from lightning_peft.callbacks import AdapterCheckpoint
from lightning_peft.cli import PEFTCLI, main

NAMES = sorted(file.stem for file in CONFIGS.glob("*.yaml"))
BASES = {
    "quickstart": SingleDeviceStrategy,
    "one_gpu": SingleDeviceStrategy,
    "ddp_8gpu": DDPStrategy,
    "multi_node": DDPStrategy,
    "fsdp": FSDPStrategy,
    "model_parallel": ModelParallelStrategy,
    **dict.fromkeys(("chat", "preference_tuning", "seq2seq"), SingleDeviceStrategy),
    **dict.fromkeys(("sequence_classification", "token_classification"), SingleDeviceStrategy),
}
"""The Lightning strategy of each config that can be instantiated here."""
PARSED_ONLY = {
    "deepspeed_zero2": "DeepSpeedStrategy asks for the package deepspeed when it is made",
    "deepspeed_zero3": "DeepSpeedStrategy asks for the package deepspeed when it is made",
    "qlora_one_gpu": "BitsandbytesPrecision asks for the package bitsandbytes when it is made, and for CUDA to run",
}
SHARDED = ["fsdp", "model_parallel"]
"""Run on two processes: on one, FSDP1 does not shard."""
STRATEGY = "--trainer.strategy.init_args"


class Made(PEFTCLI):
    """The command up to the point where a run would start."""

    def _run_subcommand(self, subcommand: str) -> None:
        return


# Of attention alone: query, key, value and output in each of two blocks of an encoder; twice in each of a decoder.
PAIRS = {"seq2seq": 24, "sequence_classification": 8, "token_classification": 8}
TINY = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
ENCODER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TURNS = [{"role": "user", "content": "12?"}, {"role": "assistant", "content": "84"}]
# Tasks of their own kind of model or record: the model, and the file's records.
OF_TASKS: dict[str, tuple[Any, ...]] = {
    "chat": (None, {"messages": TURNS}),
    "preference_tuning": (None, {"prompt": "12?", "chosen": "84", "rejected": "48"}),
    "seq2seq": (
        lambda: t.T5ForConditionalGeneration(t.T5Config(vocab_size=12, **TINY)),
        {"document": "12?34", "summary": "84"},
    ),
    "sequence_classification": (
        lambda: t.BertModel(t.BertConfig(vocab_size=12, **ENCODER)),
        *({"text": "12", "label": label} for label in ("good", "bad")),
    ),
    "token_classification": (
        lambda: t.BertModel(t.BertConfig(vocab_size=12, **ENCODER)),
        {"tokens": [*"123456789"], "labels": [*"ABCDEFGHI"]},
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    model_and_data(path)
    for name, (make, *records) in OF_TASKS.items():
        (path / f"{name}.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records * 16))
        shutil.copytree(path / "model", path / name)
        if make is not None:
            (path / name / "model.safetensors").unlink()
            make().save_pretrained(path / name)
    tokenizer = t.AutoTokenizer.from_pretrained(path / "chat")
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.content }}{{ eos_token }}{% endfor %}"
    tokenizer.save_pretrained(path / "chat")
    return path


@pytest.fixture
def arguments(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What takes the place of GPUs, of the model and of the data."""
    monkeypatch.chdir(tmp_path)
    files = [f"--data.init_args.{split}_file={folder / 'questions.jsonl'}" for split in ("train", "val")]
    trainer = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.num_nodes=1"]
    limits = [
        "--trainer.max_steps=1",
        "--trainer.limit_train_batches=1",
        "--trainer.accumulate_grad_batches=1",
        "--trainer.enable_progress_bar=false",
    ]
    model = [f"--model.init_args.model={folder / 'model'}", "--model.init_args.warmup_steps=0"]
    return [*trainer, *limits, *model, *files, f"{STRATEGY}.method.init_args.r=2", "--data.init_args.num_workers=0"]


def fitting(name: str, arguments: list[str], folder: Path) -> list[str]:
    """Add to ``arguments`` what one config alone needs to be run on a CPU."""
    command = ["fit", f"--config={CONFIGS / name}.yaml", *arguments]
    base = f"{STRATEGY}.base"
    if name == "fsdp":
        command += [
            f"{base}=distributed_script.CPUFSDPStrategy",
            f"{base}.auto_wrap_policy=[transformers.models.llama.modeling_llama.LlamaDecoderLayer]",
        ]
    if name in OF_TASKS:
        command += [f"--model.init_args.model={folder / name}"]
        command += [f"--data.init_args.{split}_file={folder / name}.jsonl" for split in ("train", "val")]
    if name == "multi_node":
        command += ["--trainer.callbacks.every_n_train_steps=1"]
    if name == "model_parallel":
        command += [f"{base}.init_args.data_parallel_size=1", f"{STRATEGY}.base_weights={folder / 'model'}"]
    return command


def test_every_config_is_tested_one_way_or_the_other() -> None:
    assert sorted([*BASES, *PARSED_ONLY]) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_config_is_parsed_as_it_stands(name: str) -> None:
    config = Read(["fit", f"--config={CONFIGS / name}.yaml"]).config.fit
    assert config.trainer.strategy.class_path == "lightning_peft.PEFTStrategy"
    assert config.trainer.strategy.init_args.method.class_path == "lightning_peft.LoRA"
    saver = config.trainer.callbacks[0]
    assert saver.class_path == "lightning_peft.callbacks.AdapterCheckpoint"
    assert saver.init_args.save_last is True
    if name in PARSED_ONLY and name.startswith("deepspeed"):
        assert base_of(config).init_args.stage == int(name[-1])


def base_of(config: Namespace) -> Namespace:
    base: Namespace = config.trainer.strategy.init_args.base
    return base


@pytest.mark.parametrize("name", NAMES)
def test_a_config_says_how_it_is_run(name: str) -> None:
    """And names no key that it does not explain: each has a comment here, or in the file to begin with."""
    text = (CONFIGS / f"{name}.yaml").read_text()
    header = re.match(r"(?:#.*\n)+", text)
    assert header
    command = "sbatch examples/launch/slurm.sbatch" if name == "multi_node" else f"fit --config {name}.yaml"
    assert command in header[0]


@pytest.mark.parametrize("name", BASES)
def test_a_config_makes_its_objects(name: str, arguments: list[str], folder: Path) -> None:
    made = Made(fitting(name, arguments, folder))
    strategy = made.trainer.strategy
    assert isinstance(strategy, PEFTStrategy)
    assert isinstance(strategy, BASES[name])
    assert [type(method) for method in strategy.methods] == [LoRA]
    assert isinstance(made.trainer.checkpoint_callback, AdapterCheckpoint)


@pytest.mark.parametrize("name", [name for name in BASES if name not in SHARDED])
def test_a_config_trains(name: str, arguments: list[str], folder: Path, tmp_path: Path) -> None:
    """A step on one process, a validation where the config has one, and the last checkpoint."""
    try:
        cli = PEFTCLI(fitting(name, arguments, folder))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert cli.trainer.global_step == 1
    saver = cli.trainer.checkpoint_callback
    assert isinstance(saver, AdapterCheckpoint)
    assert_trained(Path(saver.last_model_path), tmp_path, PAIRS.get(name, 14))
    if saver.monitor:
        assert saver.best_model_score is not None


@pytest.mark.parametrize("name", SHARDED)
def test_a_config_trains_on_two_processes(name: str, arguments: list[str], folder: Path, tmp_path: Path) -> None:
    command = [*fitting(name, arguments, folder), "--trainer.devices=2"]
    if name == "model_parallel":
        command.append(f"{STRATEGY}.base.init_args.data_parallel_size=2")
    environment = {**clean_environment(), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, "-m", "lightning_peft", *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"PEFT{BASES[name].__name__}" in done.stderr.replace("PEFTCPUFSDP", "PEFTFSDP")
    assert_trained(tmp_path / "runs" / name / "checkpoints" / "last", tmp_path)


def assert_trained(checkpoint: Path, folder: Path, pairs: int = 14) -> None:
    """Check what a run wrote: by default A and B of seven linear layers in each of two blocks."""
    assert checkpoint.is_relative_to(folder)
    with safe_open(checkpoint / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
        assert sum("lora_" in name for name in names) == pairs * 2
        assert all(file.get_tensor(name).any() for name in names if "lora_B" in name)


def test_a_sharded_model_needs_its_weights(arguments: list[str], folder: Path) -> None:
    """Without them Lightning would fill the model with random values, and training would go on."""
    try:
        with pytest.raises(SystemExit, match="the strategy was given none: they would be random"):
            main([*fitting("model_parallel", arguments, folder), f"{STRATEGY}.base_weights=null"])
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
