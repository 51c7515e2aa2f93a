"""What is chosen by validation, and which runs are due; the judge is a table of results whose best is known."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from comparable import grid_file

from lightning_peft.comparison.cells import Run, cells
from lightning_peft.comparison.choosing import State, candidate_runs, chosen, compared_runs, count, due
from lightning_peft.comparison.grid import Grid, read_grid

RATES = ["0.1", "0.01", "0.001"]
AXES = {"rank": [1, 2], "lr": [0.1, 0.01, 0.001], "seed": [0, 1, 2]}
# By rank: the validation loss of each rate with seeds 0 and 1. The best of rank 1 is so by its mean alone.
LOSSES = {"1": {"0.1": (0.2, 0.9), "0.01": (0.3, 0.3), "0.001": (0.4, 0.4)}, "2": {r: (0.5, 0.5) for r in RATES}}


class Played(State):
    """Results that are as a table says; whoever asks for what test data gave finds the contrary of validation."""

    def __init__(self, losses: dict[str, dict[str, tuple[float, ...]]], missing: Any = ()) -> None:
        self.losses, self.missing = losses, missing
        super().__init__(self._of, lambda run: "died" if self._value(run) is None else None)

    def _value(self, run: Run) -> float | None:
        values = self.losses[run.cell.labels["rank"]][str(run.candidate)]
        return values[int(str(run.seed))] if int(str(run.seed)) < len(values) else None

    def _of(self, run: Run) -> dict[str, Any] | None:
        value = self._value(run)
        if value is None or (run.cell.labels["rank"], run.candidate, run.seed) in self.missing:
            return None
        return {"validate": {"val_loss": value, "val_accuracy": -value}, "test": {"test_loss": -value}}


def grid_of(folder: Path, **choice: Any) -> Grid:
    given = {"axis": "lr", "metric": "val_loss", "mode": "min", "seeds": [0, 1], **choice}
    return read_grid(grid_file(folder, axes=AXES, choose=given))


def test_the_best_mean_on_validation_is_chosen(tmp_path: Path) -> None:
    grid = grid_of(tmp_path)
    first, second = cells(grid)
    assert chosen(grid, first, Played(LOSSES)) == "0.01"
    assert chosen(grid, second, Played(LOSSES)) == "0.1"  # of equal ones the first
    assert chosen(grid_of(tmp_path, seeds=[0]), first, Played(LOSSES)) == "0.1"
    upwards = grid_of(tmp_path, metric="val_accuracy", mode="max")
    assert chosen(upwards, first, Played(LOSSES)) == "0.01"


@pytest.mark.parametrize("order", list(itertools.permutations([0.1, 0.2, 0.3])))
def test_the_choice_is_the_minimum_in_any_order(order: tuple[float, ...], tmp_path: Path) -> None:
    grid = grid_of(tmp_path, seeds=[0])
    losses = {"1": {rate: (loss,) for rate, loss in zip(RATES, order, strict=True)}}
    assert chosen(grid, cells(grid)[0], Played(losses)) == RATES[order.index(0.1)]


def test_what_failed_or_is_no_number_is_not_chosen(tmp_path: Path) -> None:
    grid = grid_of(tmp_path)
    cell = cells(grid)[0]
    losses = {"1": {"0.1": (0.0,), "0.01": (0.1, math.nan), "0.001": (9.0, 9.0)}}
    assert chosen(grid, cell, Played(losses)) == "0.001"
    none = Played({"1": {"0.1": (0.0,), "0.01": (0.1, math.nan), "0.001": (9.0, math.inf)}})
    assert chosen(grid, cell, none) is None
    assert compared_runs(grid, cell, none) is None


def test_nothing_is_chosen_before_all_are_there(tmp_path: Path) -> None:
    grid = grid_of(tmp_path)
    waits = Played(LOSSES, missing={("1", "0.001", "1")})
    assert chosen(grid, cells(grid)[0], waits) is None
    named = [(run.name, stages) for run, stages in due(grid, cells(grid), waits)]
    assert [stages for name, stages in named if name.startswith("rank=1")] == [("validate",)] * 6
    compared = [name for name, stages in named if "test" in stages]
    assert compared == [f"rank=2, lr=0.1, seed={seed}" for seed in range(3)]


def test_all_seeds_run_with_what_was_chosen(tmp_path: Path) -> None:
    grid = grid_of(tmp_path)
    found = cells(grid)
    everything = list(due(grid, found, Played(LOSSES)))
    assert count(grid, found) == len(everything) == 2 * 6 + 2 * 3
    assert [run.candidate for run, stages in everything if "test" in stages] == ["0.01"] * 3 + ["0.1"] * 3
    # The chosen candidate's run goes on; it is not trained a second time.
    assert everything[12][0] is candidate_runs(grid, found[0])[2]


def test_without_the_metric_nothing_is_chosen(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, metric="val_los")
    assert chosen(grid, cells(grid)[0], Played(LOSSES)) is None
