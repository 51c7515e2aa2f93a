"""Every command and snippet of the pages is run here; what cannot be, and says so above it, is parsed."""

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import commands
import lightning as L
import pages
import peft
import pytest
import torch
import yaml
from families import build
from launch import run_script
from lightning.pytorch.strategies import DDPStrategy
from pages import PAGES, ROOT
from read_config import Read

import lightning_peft
from lightning_peft import LoRA, PEFTMethod, PEFTStrategy
from lightning_peft.cli import main

README = ROOT / "README.md"
LARGE_MODELS = ROOT / "examples" / "docs" / "large_models.md"
# `test_contributing.py` takes the method that CONTRIBUTING shows through its whole life.
RUN_HERE = [page for page in PAGES if page.name != "CONTRIBUTING.md"]


def having(language: str, among: list[Path] = PAGES) -> Any:
    return pytest.mark.parametrize("page", [p for p in among if pages.blocks(p, language)], ids=pages.name)


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(16, 16)
        torch.nn.init.eye_(self.net.weight)  # the same base each time
        torch.nn.init.zeros_(self.net.bias)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.net(batch).pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def given(page: Path) -> dict[str, Any]:
    """Return what the snippets of a page take for granted."""
    if page.name in ("methods.md", "coming_from.md"):
        ids = torch.arange(1, 9)[None]
        return {"model": build("llama")[0], "ids": ids, "labels": ids}
    if page.name == "quantised.md":
        build("llama")[0].save_pretrained("path/to/model")
    if page.name == "serving.md":
        for name in ("sql", "chat"):
            lightning_peft.inject(model := Model(), LoRA(r=2))
            lightning_peft.save_adapter(model, f"adapters/{name}")
    data = torch.utils.data.DataLoader(torch.randn(8, 16), batch_size=4)
    return {"model": Model(), "net": Model(), "data": data}


@having("python", RUN_HERE)
def test_python_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The snippets of a page one after the other, as a reader would type them, print what the page says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(L, "Trainer", functools.partial(L.Trainer, max_epochs=1, accelerator="cpu"))
    scope = given(page)
    for block in pages.blocks(page, "python"):
        assert not block.not_run
        exec(block.text, scope)
    said = {line.strip() for line in caplog.text.splitlines()}
    for block in pages.blocks(page, "text"):
        assert set(block.text.splitlines()) - said == set()
    if page == README:
        assert isinstance(scope["trainer"].strategy, PEFTStrategy)
        assert scope["trainer"].global_step == 2
        lightning_peft.load_adapter(Model(), "checkpoints/last")
        assert list(scope["model"][0].peft) == ["sql", "chat", "both", "ties"]


@pytest.mark.parametrize("page", PAGES, ids=pages.name)
def test_objects_within_sentences_can_be_made(page: Path) -> None:
    """``LoRA(r=8)`` and the like, but for those that leave something out."""
    made = {name: value for name, value in vars(lightning_peft).items() if isinstance(value, type)}
    scope = {
        **made,
        "peft": peft,
        "Trainer": functools.partial(L.Trainer, accelerator="cpu"),
        "DDPStrategy": DDPStrategy,
    }
    for code in pages.inline(page):
        if code.partition("(")[0] in scope and code.endswith(")") and not any(dots in code for dots in ("...", "…")):
            assert isinstance(eval(code, dict(scope)), PEFTMethod | PEFTStrategy | L.Trainer), code


SHARDED = """
import sys
import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_peft import LoRA, PEFTStrategy
from torch.distributed.tensor import DTensor
from transformers import AutoConfig

{snippet}

class Runs(Sharded):
    def __init__(self):
        super().__init__()
        self.model = None
        self.config = AutoConfig.from_pretrained(sys.argv[1])

    def training_step(self, ids, batch_idx):
        return self.model(input_ids=ids, labels=ids, use_cache=False).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())

    def on_train_start(self):
        assert all(isinstance(p, DTensor) for p in self.parameters())

base = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
strategy = PEFTStrategy(LoRA(r=2), base=base, base_weights=sys.argv[1])
trainer = L.Trainer(strategy=strategy, max_steps=1, accelerator="cpu", devices=2, logger=False)
trainer.fit(Runs(), torch.utils.data.DataLoader(torch.randint(0, 50, (2, 8))))
assert trainer.global_step == 1
from distributed_script import finish
finish()
"""


def test_the_sharded_module_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("llama")[0].save_pretrained(tmp_path / "model")
    script = tmp_path / "script.py"
    script.write_text(SHARDED.format(snippet=pages.blocks(LARGE_MODELS, "python")[0].text))
    monkeypatch.chdir(tmp_path)  # where its checkpoint goes
    run_script(str(script), tmp_path / "model")


# `test_first_steps_page.py` runs the config of that page, which is a whole one; `test_comparing_page.py` takes a grid.
@having("yaml", [page for page in PAGES if page.name not in ("first_steps.md", "comparing.md")])
def test_yaml_is_a_part_of_a_config(page: Path, tmp_path: Path) -> None:
    for block in pages.blocks(page, "yaml"):
        (tmp_path / "part.yaml").write_text(block.text)
        files = [f"--config={file}" for file in (commands.QUICKSTART, tmp_path / "part.yaml")]
        read = Read(["fit", *files]).config.fit.trainer.strategy
        wanted = yaml.safe_load(block.text)["trainer"]["strategy"]["init_args"]["method"]
        assert read.class_path == "lightning_peft.PEFTStrategy"
        assert read.init_args.method.class_path == wanted["class_path"]
        assert wanted["init_args"].items() <= read.init_args.method.init_args.as_dict().items()


@pytest.mark.parametrize("page", PAGES, ids=pages.name)
def test_commands_are_sound(page: Path) -> None:
    """Whether they are run or not, in blocks and within sentences."""
    within = [code for code in pages.inline(page) if commands.is_command(code)]
    for command in [*pages.commands(page, run=True), *pages.commands(page, run=False), *within]:
        commands.check(command)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as after ``make quickstart``, but with the tiny model of ``make quickstart-fast``."""
    folder = tmp_path_factory.mktemp("workplace")
    for name in ("examples", "tests"):
        (folder / name).symlink_to(ROOT / name)
    in_a_shell("python examples/quickstart.py --fast", folder)
    return folder


def in_a_shell(command: str, folder: Path) -> None:
    paths = {"PATH": Path(sys.executable).parent, "PYTHONPATH": ROOT}
    inherited = {name: f"{path}{os.pathsep}{os.environ.get(name, '')}" for name, path in paths.items()}
    environment = {**os.environ, **inherited, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def in_this_process(command: str) -> None:
    """Run ``lightning-peft``, whose imports take longer than what it does here."""
    _, *arguments = commands.words(command)
    if arguments[0] in ("fit", "plan"):
        arguments += ["--trainer.max_steps=1", "--model.init_args.model=.quickstart/tiny"]  # the real one takes minutes
    try:
        main(arguments)
    except SystemExit as end:
        if end.code:
            pytest.fail(f"{command}\n{end.code}")


# Continuous integration runs the others, and `test_packaging.py` installs the wheel that it builds.
FOUND = dict.fromkeys(command for page in PAGES for command in pages.commands(page, run=True))
RUN = [command for command in FOUND if not command.startswith(("make ", "pip "))]


@pytest.mark.parametrize("command", RUN)
def test_a_command_runs(command: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    if commands.words(command)[0] == "lightning-peft":
        in_this_process(command)
    else:
        # A benchmark writes to the root of the repository if it is not told otherwise.
        in_a_shell(command + (" --out bench" if "benchmarks" in command else ""), workplace)
    # The pages speak of `last`: it has to be that of the last run.
    assert [path.name for path in Path(".quickstart/checkpoints").glob("last*")] == ["last"]
