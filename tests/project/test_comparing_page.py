"""The grid of the page about comparisons: the command takes it, and it has the runs that the page says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import config, model_and_data
from pages import ROOT, blocks
from read_config import Read

from lightning_peft.comparison.cells import cells, placed, run_of
from lightning_peft.comparison.choosing import State, count, due
from lightning_peft.comparison.grid import read_grid
from lightning_peft.comparison.keys import SHORT

PAGE = ROOT / "examples" / "docs" / "comparing.md"


@pytest.fixture
def grid_of_the_page(tmp_path: Path) -> Path:
    model_and_data(tmp_path)
    run = yaml.safe_load(config(tmp_path, nodes=1, batch=8, out=tmp_path / "run").read_text())
    run["trainer"] |= {"strategy": None, "callbacks": None}
    run.pop("optimizer")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    grid, slurm = blocks(PAGE, "yaml")
    (tmp_path / "methods.yaml").write_text(grid.text + slurm.text)
    return tmp_path / "methods.yaml"


def test_the_command_takes_every_cell_of_the_grid(grid_of_the_page: Path, tmp_path: Path) -> None:
    grid = read_grid(grid_of_the_page)
    found = cells(grid)
    assert [cell.name for cell in found] == ["LoRA", "BitFit", "series adapters"]
    for cell in found:
        for candidate in cell.candidates:
            (tmp_path / "cell.yaml").write_text(yaml.safe_dump(placed(run_of(grid, cell, candidate, "0"))))
            read: Any = Read(["fit", f"--config={tmp_path / 'cell.yaml'}"]).config.fit
            assert read.model.init_args.lr == float(candidate)


def test_the_page_counts_its_runs(grid_of_the_page: Path) -> None:
    grid = read_grid(grid_of_the_page)
    found = cells(grid)
    nothing = State(lambda run: None, lambda run: None)
    assert len(list(due(grid, found, nothing))) == 6
    assert "Here six runs choose the rates" in " ".join(PAGE.read_text().split())
    assert count(grid, found) == 6 + 9


def test_the_page_has_every_short_name() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in SHORT if f"`{name}`" in row.split("|")[1]} == set(SHORT)
