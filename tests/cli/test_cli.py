"""The command, mostly run within this process; its classes below are what a user's module would hold."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from modules import Llama
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaForCausalLM

import lightning_peft
from lightning_peft import LoRA, PEFTStrategy, SeriesAdapter, adapter_state_dict, inject, save_adapter
from lightning_peft.callbacks import AdapterCheckpoint
from lightning_peft.cli import COMMANDS, PEFTCLI, RUNS, main

MODEL = "--model=test_cli.Regression"
DATA = "--data=test_cli.Noise"
QUIET = [
    "--seed_everything=1",
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.max_steps=2",
]
METHOD = {"class_path": "lightning_peft.LoRA", "init_args": {"r": 2, "target_modules": ["up", "down"]}}
STRATEGY = {"class_path": "lightning_peft.PEFTStrategy", "init_args": {"method": METHOD}}


class Regression(LightningModule):
    """A model that is frozen but for its adapters, with an optimizer of its own."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.up = nn.Linear(8, width)
        self.down = nn.Linear(width, 8)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return (self.down(self.up(batch[0]).relu()) - batch[0]).square().mean()

    def test_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Broken(Regression):
    """A model whose constructor has a fault."""

    def __init__(self) -> None:
        super().__init__()
        raise RuntimeError("a fault of the user's program")


class Noise(LightningDataModule):
    """Data without files."""

    def train_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        return DataLoader(TensorDataset(torch.randn(8, 8)), batch_size=4)

    test_dataloader = train_dataloader


def run(*args: str) -> PEFTCLI:
    """Run a command within this process and return what it made."""
    return PEFTCLI(list(args))


def fit(*args: str) -> PEFTCLI:
    return run("fit", MODEL, DATA, *QUIET, *args)


def refused(args: Sequence[str]) -> str:
    """Run a command that must end with one message."""
    with pytest.raises(SystemExit) as stop:
        main(list(args))
    assert isinstance(stop.value.code, str)
    return stop.value.code


def in_a_process(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "100"}
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=cwd, env=environment)


def config_file(path: Path, strategy: object, **trainer: object) -> str:
    path.write_text(yaml.safe_dump({"trainer": {"strategy": strategy, **trainer}}))
    return f"--config={path}"


def method_of(cli: PEFTCLI) -> LoRA:
    strategy = cli.trainer.strategy
    assert isinstance(strategy, PEFTStrategy)
    (method,) = strategy.methods
    assert isinstance(method, LoRA)
    return method


# Help


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert not end.value.code
    assert capsys.readouterr().out.strip() == f"lightning-peft {metadata.version('lightning_peft')}"
    assert lightning_peft.__version__ == metadata.version("lightning_peft")


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: lightning-peft ")
    for command in (*RUNS, *COMMANDS):
        assert f"\n    {command} " in printed


@pytest.mark.parametrize("command", RUNS)
def test_help_of_a_run_is_complete(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: lightning-peft {command} ")
    for option in ("config", "print_config", "trainer.strategy", "model", "data", "optimizer", "ckpt_path"):
        assert re.search(rf"^  (-c CONFIG, )?--{option}\b", printed, re.MULTILINE)


def test_help_offers_one_strategy_of_this_package() -> None:
    """What differs by base strategy are classes of strategies too, but none to choose."""
    printed = in_a_process(sys.executable, "-m", "lightning_peft", "fit", "--help").stdout
    section = printed.partition("--trainer.strategy STRATEGY")[2].partition("\n  --")[0]
    assert re.findall(r"lightning_peft[\w.]+", section) == ["lightning_peft.PEFTStrategy"]


def test_help_of_the_strategy_documents_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--trainer.strategy.help=PEFTStrategy"])
    printed = capsys.readouterr().out
    for option in ("method", "base", "merge_on_train_end", "checkpoint", "train_also"):
        assert f"  --trainer.strategy.{option} " in printed


def test_module_and_script_are_the_same_command() -> None:
    script = in_a_process(Path(sys.executable).with_name("lightning-peft"), "--help")
    module = in_a_process(sys.executable, "-m", "lightning_peft", "--help")
    assert script.returncode == module.returncode == 0, script.stderr + module.stderr
    assert script.stdout == module.stdout


# Naming the strategy


@pytest.mark.parametrize(
    "args",
    [
        ["--trainer.strategy=peft_lora"],
        ["--trainer.strategy", "peft"],
        ["--trainer.strategy=PEFTStrategy"],
        ["--trainer.strategy", "lightning_peft.PEFTStrategy"],
        ["--trainer.strategy.class_path=lightning_peft.PEFTStrategy"],
        ["--trainer.strategy=PEFTStrategy", "--trainer.strategy.method=LoRA"],
    ],
    ids=" ".join,
)
def test_a_strategy_on_the_command_line(args: list[str]) -> None:
    assert method_of(fit(*args)) == LoRA()


@pytest.mark.parametrize("strategy", ["peft_lora", "PEFTStrategy", STRATEGY], ids=["name", "class", "class_path"])
def test_a_strategy_in_a_file(strategy: object, tmp_path: Path) -> None:
    method = method_of(fit(config_file(tmp_path / "run.yaml", strategy)))
    assert method == (LoRA(r=2, target_modules=["up", "down"]) if strategy is STRATEGY else LoRA())


@pytest.mark.parametrize("option", ["init_args.method.init_args.r", "method.r"])
def test_the_command_line_overrides_a_file(option: str, tmp_path: Path) -> None:
    method = method_of(fit(config_file(tmp_path / "run.yaml", STRATEGY), f"--trainer.strategy.{option}=4"))
    assert method == LoRA(r=4, target_modules=["up", "down"])


def test_a_base_in_a_file(tmp_path: Path) -> None:
    base = {"class_path": "lightning.pytorch.strategies.SingleDeviceStrategy", "init_args": {"device": "cpu"}}
    strategy = {"class_path": "PEFTStrategy", "init_args": {"method": "lora", "base": base}}
    cli = fit(config_file(tmp_path / "run.yaml", strategy))
    assert method_of(cli) == LoRA()


def test_an_unknown_strategy_lists_those_that_exist() -> None:
    message = refused(["fit", MODEL, "--trainer.strategy=peft_lorra"])
    assert "'peft_lorra'" in message
    assert "Did you mean 'peft_lora'?" in message
    assert re.search(r"METHOD: .*lora", message)
    assert "ddp, ddp_spawn" in message


def test_an_unknown_option_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        fit("--trainer.strategy=PEFTStrategy", "--trainer.strategy.method=LoRA", "--trainer.strategy.method.rank=4")
    assert stop.value.code == 2
    assert "error: LoRA has no 'rank'. It has r, alpha," in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model=CausalML"], "error: --model CausalML: there is no such class. Did you mean 'CausalLM'?"),
        (["--model=CausalLM", "--data=x/y.jsonl"], "--data x/y.jsonl: there is no such class."),
        (["--model=models/tiny"], "--model CausalLM --model.model models/tiny"),
        ([MODEL, "--data=InstructData"], "Did you mean 'InstructionData'? Ready ones are ClassificationData, Inst"),
        (
            ["--model.class_path=lightning_peft.tasks.CausalML"],
            "lightning_peft.tasks has no class 'CausalML'. Did you",
        ),
        (
            ["--model=CausalLM", "--model.modl=x"],
            "CausalLM has no 'modl'. Did you mean 'model'? It has model,",
        ),
        (
            ["--model=CausalLM", "--model.model=x", "--model.lr=y"],
            "CausalLM: lr=y was given; float was expected.",
        ),
        (["--model=SequenceClassification", "--model.model=x"], "error: SequenceClassification needs num_labels."),
        ([MODEL, "--trainer.callbacks+=AdapterCheckpoint", "--trainer.callbacks.monitr=x"], "Did you mean 'monitor'?"),
    ],
)
def test_a_mistake_in_a_class_or_its_options_is_one_message(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments])
    assert stop.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert expected in said
    assert "NoneType" not in said


def test_an_argument_that_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["diff", "one"])
    assert "error: diff needs SECOND; see lightning-peft diff --help." in capsys.readouterr().err


def test_options_after_a_registered_name_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        fit("--trainer.strategy=peft_lora", "--trainer.strategy.method.r=4")
    assert stop.value.code == 2
    assert "--trainer.strategy=PEFTStrategy --trainer.strategy.method=LoRA" in capsys.readouterr().err


# Running


def test_a_printed_config_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [MODEL, DATA, *QUIET, config_file(tmp_path / "run.yaml", STRATEGY)]
    with pytest.raises(SystemExit):
        main(["fit", *args, "--print_config"])
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    cli = run("fit", f"--config={printed}", "--trainer.fast_dev_run=1")
    assert method_of(cli) == LoRA(r=2, target_modules=["up", "down"])
    assert cli.trainer.global_step == 1


@pytest.mark.parametrize(
    "optimizer", [[], ["--optimizer=torch.optim.AdamW", "--optimizer.lr=0.1"]], ids=["own", "AdamW"]
)
def test_fit_trains_the_adapters_alone(optimizer: list[str]) -> None:
    cli = fit("--trainer.strategy=peft_lora", *optimizer)
    state = adapter_state_dict(cli.model)
    moved = [tensor for name, tensor in state.items() if name.endswith("lora_B")]
    assert len(moved) == 2
    assert all(tensor.abs().sum() > 0 for tensor in moved)
    trained = {id(p) for group in cli.trainer.optimizers[0].param_groups for p in group["params"]}
    assert len(trained) == len(state)


def test_a_checkpoint_is_tested(tmp_path: Path) -> None:
    strategy = config_file(tmp_path / "run.yaml", STRATEGY)
    trained = fit(strategy)
    file = tmp_path / "adapter.ckpt"
    trained.trainer.save_checkpoint(file)
    cli = run("test", MODEL, DATA, *QUIET, strategy, f"--ckpt_path={file}")
    assert "test_loss" in cli.trainer.callback_metrics


def test_the_command_line_says_what_is_made_not_the_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "adapter.ckpt"
    fit("--trainer.strategy=peft_lora").trainer.save_checkpoint(file)
    ran = tmp_path / "ran"
    called = {"class_path": "os.mkdir", "init_args": {"path": str(ran)}}
    for hyper_parameters in ({"width": 4}, {"width": called}, {"_class_path": "test_cli.Broken"}):
        saved = torch.load(file, weights_only=True)
        torch.save({**saved, "hyper_parameters": hyper_parameters}, file)
        cli = run("test", MODEL, DATA, *QUIET, "--trainer.strategy=peft_lora", f"--ckpt_path={file}")
        assert cli.model.up.out_features == 16
    assert not ran.exists()


def test_a_wrong_value_is_one_message() -> None:
    options = ["--trainer.strategy=PEFTStrategy", "--trainer.strategy.method=LoRA", "--trainer.strategy.method.r=0"]
    message = refused(["fit", MODEL, DATA, *QUIET, *options])
    assert message.startswith("lightning-peft: error: ")
    assert "r=0" in message
    assert "\n" not in message


# Refused by the method itself: given, expected, and what to do where that does not say it.
WRONG_VALUES: dict[tuple[str, str, object], str] = {
    ("SeriesAdapter", "bottleneck", 0): "SeriesAdapter: bottleneck=0 was given; it is a whole number of at least 1.",
    ("ParallelAdapter", "activation", "cos"): "ParallelAdapter: activation='cos' was given; it is one of relu, gelu,",
    (
        "Compacter",
        "bottleneck",
        6,
    ): "Compacter: bottleneck=6 was given with n=4; a multiple of n was expected,",
    ("VeRA", "d_initial", 0): "VeRA: d_initial=0.0 was given; it is a number other than 0",
    ("PrefixTuning", "num_virtual_tokens", 0): "PrefixTuning: num_virtual_tokens=0 was given; it is a whole number of",
}
# Refused for their type or name, before the method is made.
WRONG_TYPES: dict[tuple[str, str, object], str] = {
    ("SeriesAdapter", "bottleneck", 1.5): "SeriesAdapter: bottleneck=1.5 was given; int was expected.",
    ("SeriesAdapter", "preset", "x"): "SeriesAdapter: preset=x was given; one of 'houlsby', 'pfeiffer', 'llm_adapters'",
    ("Compacter", "placement", "[layer]"): "Compacter: placement=['layer'] was given; one of 'attention', 'mlp' was",
    ("BitFit", "create_missing", "perhaps"): "BitFit: create_missing=perhaps was given; bool was expected.",
    ("LoRA", "alfa", 3): "LoRA has no 'alfa'. Did you mean 'alpha'? It has r, alpha, dropout,",
    ("Compactor", "n", 4): "There is no method 'Compactor'. Did you mean 'Compacter'? Methods: AdaLoRA, BEFT,",
}


def of_method(case: tuple[str, str, object], where: str, folder: Path) -> list[str]:
    """A hyper-parameter on the command line, in a config, or in a list of methods in a config."""
    name, key, value = case
    if where == "command line":
        options = ["--trainer.strategy=PEFTStrategy", f"--trainer.strategy.method={name}"]
        return ["fit", MODEL, DATA, *QUIET, *options, f"--trainer.strategy.method.{key}={value}"]
    init_args = {key: yaml.safe_load(str(value))}
    method: object = {"class_path": f"lightning_peft.{name}", "init_args": init_args}
    strategy = {**STRATEGY, "init_args": {"method": [METHOD, method] if where == "list" else method}}
    return ["fit", MODEL, DATA, *QUIET, config_file(folder / "run.yaml", strategy)]


@pytest.mark.parametrize("where", ["command line", "config", "list"])
@pytest.mark.parametrize("case", [*WRONG_VALUES, *WRONG_TYPES], ids=str)
def test_a_wrong_hyper_parameter_is_one_line(
    case: tuple[str, str, object], where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(of_method(case, where, tmp_path))
    printed = str(stop.value.code) if case in WRONG_VALUES else capsys.readouterr().err
    *_, line = printed.strip().splitlines()
    assert line.removeprefix("lightning-peft: ").startswith(f"error: {(WRONG_VALUES | WRONG_TYPES)[case]}")
    assert "Union" not in printed
    assert "Traceback" not in printed


def test_a_missing_checkpoint_is_one_message(tmp_path: Path) -> None:
    message = refused(["fit", MODEL, DATA, *QUIET, f"--ckpt_path={tmp_path / 'no.ckpt'}"])
    assert "no.ckpt" in message


def test_a_fault_in_a_model_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"^a fault of the user's program$") as fault:
        main(["fit", "--model=test_cli.Broken", *QUIET])
    assert fault.traceback[-1].name == "__init__"
    assert fault.value.__context__ is None


def test_a_process_ends_with_one_message_and_status_1(tmp_path: Path) -> None:
    """And finds the user's module in the working directory, which a script does not have on its path."""
    (tmp_path / "own.py").write_text("from lightning.pytorch.demos.boring_classes import BoringModel as Own\n")
    script = Path(sys.executable).with_name("lightning-peft")
    done = in_a_process(script, "fit", "--model=own.Own", "--trainer.strategy=peft_none", cwd=tmp_path)
    assert done.returncode == 1
    assert "lightning-peft: error: There is no strategy 'peft_none'." in done.stderr
    assert "Traceback" not in done.stderr


# The record of a run


def test_a_second_run_replaces_the_record(tmp_path: Path) -> None:
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path), "name": "", "version": ""}}
    args = ["fit", MODEL, DATA, *QUIET[:3], *QUIET[4:], config_file(tmp_path / "run.yaml", STRATEGY, logger=logger)]
    for steps in (1, 2):
        cli = run(*args, f"--trainer.max_steps={steps}")
        assert isinstance(cli.trainer.logger, CSVLogger)
        record = yaml.safe_load((tmp_path / "config.yaml").read_text())
        assert record["trainer"]["max_steps"] == steps
    assert record["trainer"]["strategy"]["init_args"]["method"]["init_args"]["r"] == 2


def test_a_file_given_as_config_is_not_replaced(tmp_path: Path) -> None:
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path), "name": "", "version": ""}}
    given = config_file(tmp_path / "config.yaml", STRATEGY, logger=logger)
    before = (tmp_path / "config.yaml").read_text()
    run("fit", MODEL, DATA, *QUIET[:3], *QUIET[4:], given)
    assert (tmp_path / "config.yaml").read_text() == before


def test_no_record_without_a_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fit()
    assert not list(tmp_path.iterdir())


# Commands without a Trainer


def trained_adapter(model: nn.Module, path: Path) -> None:
    """Write an adapter that changes the outputs of ``model``, which has it afterwards."""
    inject(model, LoRA(r=2, alpha=4, target_modules="attention"))
    with torch.no_grad():
        for tensor in adapter_state_dict(model).values():
            tensor.normal_(std=0.5)
    save_adapter(model, path)


def test_inspect_shows_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained_adapter(Llama().model, tmp_path / "adapter")
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(tmp_path / "adapter")])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    for part in ("LlamaForCausalLM", "LORA r=2 lora_alpha=4", "q_proj", f"16 with 448 values; the file has {size:,} "):
        assert part in printed


def test_inspect_shows_what_a_terminal_would_obey_or_not_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    inject(model, LoRA(r=2))
    save_adapter(model, tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "base_model_name_or_path": "\x1b[2J\ud800\nkind"}))
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(tmp_path / "adapter")])
    assert stop.value.code == 0
    assert r"\x1b[2J\ud800\nkind" in capsys.readouterr().out


def test_inspect_shows_what_hf_peft_has_no_format_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Llama().model
    inject(model, SeriesAdapter(bottleneck=2))
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / "adapter")])
    printed = capsys.readouterr().out
    for part in ("lightning_peft's own format", "series_adapter", "bottleneck=2"):
        assert part in printed


def test_inspect_shows_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli = fit(config_file(tmp_path / "run.yaml", STRATEGY))
    cli.trainer.save_checkpoint(tmp_path / "run.ckpt")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / "run.ckpt")])
    printed = capsys.readouterr().out
    for part in ("adapters only", "Regression", "lora (default) r=2", "4 with 96 values", "epoch 1, step 2"):
        assert part in printed


def test_inspect_shows_how_far_a_run_had_come(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Falling(BoringModel):
        def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            self.log("val_loss", torch.tensor(0.5 if self.current_epoch else 0.25))

    saver = AdapterCheckpoint(tmp_path, filename="{epoch}", monitor="val_loss", save_last=True, save_top_k=2)
    L.Trainer(
        strategy=PEFTStrategy(LoRA(r=1, alpha=1e-3)), callbacks=[saver], accelerator="cpu", max_epochs=2,
        limit_train_batches=3, limit_val_batches=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(Falling())  # fmt: skip
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / "last")])
    printed = capsys.readouterr().out
    assert "progress     epoch 1, step 6\n" in printed
    assert "monitored    val_loss 0.5, the best 0.25\n" in printed
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / "last"), "--json"])
    assert json.loads(capsys.readouterr().out)["monitored"] == ["val_loss 0.5, the best 0.25"]


def test_inspect_refuses_what_is_no_adapter(tmp_path: Path) -> None:
    assert "does not exist" in refused(["inspect", str(tmp_path / "nothing")])
    assert "adapter_config.json" in refused(["inspect", str(tmp_path)])
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    assert "is damaged or truncated, or no checkpoint" in refused(["inspect", str(tmp_path / "text.ckpt")])
    torch.save({"state_dict": {}, "path": tmp_path}, tmp_path / "object.ckpt")
    assert "holds more than tensors and plain values: pathlib" in refused(["inspect", str(tmp_path / "object.ckpt")])
    torch.save([1], tmp_path / "list.ckpt")
    assert "no Lightning checkpoint" in refused(["inspect", str(tmp_path / "list.ckpt")])
    assert "is neither a file nor a directory" in refused(["inspect", os.devnull])
    assert "There can be nothing at" in refused(["inspect", "x" * 300])
    torch.save({"state_dict": {}, "lightning_peft": {"injections": "x"}}, tmp_path / "strange.ckpt")
    assert "'lightning_peft' entry is damaged" in refused(["inspect", str(tmp_path / "strange.ckpt")])


def test_inspect_leaves_out_scores_that_are_no_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strange = {"monitor": "loss", "current_score": torch.zeros(3), "best_model_score": "x"}
    for callbacks in ({"one": strange}, "x", [strange]):
        torch.save({"state_dict": {}, "global_step": 3, "callbacks": callbacks}, tmp_path / "it.ckpt")
        with pytest.raises(SystemExit) as stop:
            main(["inspect", str(tmp_path / "it.ckpt")])
        assert stop.value.code == 0
    assert "monitored" not in capsys.readouterr().out


def test_merge_writes_a_plain_model(tmp_path: Path) -> None:
    model = Llama().model
    model.save_pretrained(tmp_path / "base")
    trained_adapter(model, tmp_path / "adapter")
    command = ["merge", str(tmp_path / "adapter"), f"--model={tmp_path / 'base'}", f"--out={tmp_path / 'merged'}"]
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == 0
    tokens = torch.arange(8)[None]
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert not list(adapter for adapter in merged.state_dict() if "lora" in adapter)
    torch.testing.assert_close(merged(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)


def test_where_a_merge_is_written_is_checked_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Llama().model
    model.save_pretrained(tmp_path / "base")
    trained_adapter(model, tmp_path / "adapter")
    command = ["merge", str(tmp_path / "adapter"), f"--model={tmp_path / 'base'}"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    monkeypatch.setattr("lightning_peft.cli.tools.merge.stream_tensors", None)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "has room for" in refused([*command, f"--out={tmp_path / 'full'}"])
    assert not (tmp_path / "full").exists()
    monkeypatch.setattr("lightning_peft.cli.tools.merge.meta_model", None)
    assert "was not written by lightning_peft" in refused([*command, f"--out={tmp_path / 'mine'}"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "mine"]


def test_merge_needs_a_base(tmp_path: Path) -> None:
    trained_adapter(Llama().model, tmp_path / "adapter")
    assert "--model" in refused(["merge", str(tmp_path / "adapter"), f"--out={tmp_path / 'merged'}"])
