"""The page of first steps, from the command: its first file and its config, beside each other in a folder."""

import sys
from pathlib import Path

import pages
import pytest
from pages import ROOT

from lightning_peft import load_adapter
from lightning_peft.cli import main

PAGE = ROOT / "examples" / "docs" / "first_steps.md"


@pytest.fixture
def beside_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "first.py").write_text(pages.blocks(PAGE, "python")[0].text)
    (tmp_path / "run.yaml").write_text(pages.blocks(PAGE, "yaml")[0].text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "first", raising=False)
    return tmp_path


def test_the_commands_train_go_on_and_show(beside_the_files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = pages.commands(PAGE, run=False)
    assert [command.split()[1] for command in commands] == ["fit", "fit", "inspect"]
    for command in commands:
        try:
            main(command.split()[1:])
        except SystemExit as end:
            if end.code:
                pytest.fail(f"{command}\n{end.code}")
    shown = capsys.readouterr().out
    assert "LORA" in shown
    assert sorted(path.name for path in Path("checkpoints").iterdir()) == ["epoch=3-step=32", "last"]
    load_adapter(sys.modules["first"].Regression(), "checkpoints/last")
