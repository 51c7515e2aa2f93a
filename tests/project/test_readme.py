"""Every command and snippet of the README is run here, or is a make target that continuous integration runs."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from families import build
from launch import run_script

from lightning_peft import PEFTStrategy

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(16, 16)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.net(batch).pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def test_python_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = blocks("python")
    assert len(found) == 4
    data = torch.utils.data.DataLoader(torch.randn(8, 16), batch_size=4)
    first = found[0].replace("L.Trainer(", "L.Trainer(max_epochs=1, accelerator='cpu', ")
    scope: dict = {"model": Model(), "data": data}
    exec(first, scope)
    assert isinstance(scope["trainer"].strategy, PEFTStrategy)
    assert scope["trainer"].global_step == 2
    exec(found[2], scope)
    assert type(scope["model"]) is torch.nn.Sequential
    assert [name for name, _ in scope["model"].named_parameters()] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    exec(found[3], scope)
    assert list(scope["model"][0].peft) == ["sql", "chat", "both", "ties"]


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
torch.distributed.destroy_process_group()
"""


def test_the_sharded_module_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("llama")[0].save_pretrained(tmp_path / "model")
    script = tmp_path / "script.py"
    script.write_text(SHARDED.format(snippet=blocks("python")[1]))
    monkeypatch.chdir(tmp_path)  # where its checkpoint goes
    run_script(str(script), tmp_path / "model")


def test_yaml_snippet_makes_the_strategy() -> None:
    (text,) = blocks("yaml")
    strategy = yaml.safe_load(text)["trainer"]["strategy"]
    config = yaml.safe_load((ROOT / "examples" / "configs" / "quickstart.yaml").read_text())
    assert strategy == config["trainer"]["strategy"]


def test_commands_run(tmp_path: Path) -> None:
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert commands.pop(0) == "make quickstart"
    assert commands.pop(0) == "make test"
    targets = (ROOT / "Makefile").read_text()
    assert re.search(r"^quickstart:", targets, re.M)
    assert re.search(r"^test:", targets, re.M)
    assert commands.pop(0) == "pip install ."  # tests/test_packaging.py installs the wheel that it builds
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    # The model in the config takes minutes: the tiny one of the quickstart's fast path takes its place.
    run(sys.executable, "examples/quickstart.py", "--fast")
    assert len(commands) == 4
    for line in commands:
        words = shlex.split(line)
        if words[1] in ("fit", "plan"):
            words += ["--trainer.max_steps=1", "--model.init_args.model=.quickstart/tiny"]
        output = run(*words)
    assert "lora" in output.lower()
