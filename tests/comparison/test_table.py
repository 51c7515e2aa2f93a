"""The table, its JSON and its plots, of results that are played; the judge is NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comparable import grid_file

from lightning_peft.comparison.cells import Run, cells
from lightning_peft.comparison.choosing import State
from lightning_peft.comparison.grid import Grid, read_grid
from lightning_peft.comparison.plots import plots
from lightning_peft.comparison.table import Row, as_json, markdown, rows, run_lines
from lightning_peft.errors import PEFTError

ACCURACY = {"1": (0.50, 0.52, 0.51), "2": (0.70, 0.72, 0.74), "8": (0.69, 0.75, 0.70)}
DEAD = ("8", "2")
"""The rank and the seed of the run that failed."""


def result(run: Run) -> dict[str, Any] | None:
    rank, seed = run.cell.labels["rank"], run.seed or "0"
    if (rank, seed) == DEAD:
        return None
    return {
        "name": run.name,
        "fingerprint": run.fingerprint,
        "steps": 9,
        "diverged": None,
        "trained_parameters": 100 * int(rank),
        "seconds_per_step": 0.5 + int(seed),
        "peak_memory": 2**20 * (10 + int(seed)),
        "bytes": 4000 * int(rank),
        "validate": {"val_loss": 1.0},
        "test": {"test_accuracy": ACCURACY[rank][int(seed)]},
        "latency": {"seconds": 0.002, "base_seconds": 0.001, "merges": rank != "8"},
    }


PLAYED = State(result, lambda run: "killed by SIGKILL" if result(run) is None else None)


@pytest.fixture
def grid(tmp_path: Path) -> Grid:
    axes = {"rank": [1, 2, 8], "seed": [0, 1, 2]}
    return read_grid(grid_file(tmp_path, axes=axes, report={"test": ["test_accuracy"]}))


@pytest.fixture
def made(grid: Grid) -> list[Row]:
    return rows(grid, cells(grid), PLAYED)


def test_figures_are_those_of_numpy(grid: Grid, made: list[Row]) -> None:
    for row in as_json(grid, made):
        rank = row["axes"]["rank"]
        values = ACCURACY[rank][:2] if rank == "8" else ACCURACY[rank]
        found = row["metrics"]["test_accuracy"]
        quantile = {2: 12.7062047, 3: 4.3026527}[len(values)]
        half = quantile * np.std(values, ddof=1) / np.sqrt(len(values))
        assert found["values"] == list(values)
        assert found["mean"] == pytest.approx(np.mean(values))
        assert found["deviation"] == pytest.approx(np.std(values, ddof=1))
        assert found["interval"] == pytest.approx([np.mean(values) - half, np.mean(values) + half])
        assert row["trained_parameters"] == 100 * int(rank)
        assert row["seconds_per_step"] == (1.0 if rank == "8" else 1.5)
    assert as_json(grid, made)[0]["overlaps"] == {"test_accuracy": {"rank=2": False, "rank=8": True}}


def test_the_table_as_markdown(grid: Grid, made: list[Row]) -> None:
    text = markdown(grid, made)
    heading, rule, *lines = text.splitlines()
    assert heading.split(" | ")[:3] == ["| rank", "seeds", "test_accuracy"]
    assert {line.count("|") for line in (heading, rule, *lines[:3])} == {10}
    assert lines[1] == "| 2 | 3 | 0.72 ± 0.02 [0.6703, 0.7697] | 200 | 1.5 | 12 | 8,000 | 2 | 1 |"
    assert lines[2] == "| 8 | 2 | 0.72 ± 0.042 [0.3388, 1.101] | 800 | 1 | 11 | 32,000 | 2* | 1 |"
    assert "test_accuracy, intervals of pairs that differ: rank=1 / rank=2. All others overlap." in text
    assert "- rank=8, seed=2: failed: killed by SIGKILL (log: " in text


def test_pairs_differ_in_one_axis(tmp_path: Path) -> None:
    axes = {"rank": [1, 2], "m": {"one": {"method.alpha": 1}, "two": {"method.alpha": 2}}, "seed": [0, 1, 2]}
    grid = read_grid(grid_file(tmp_path, axes=axes, report={"test": ["test_accuracy"]}))
    text = markdown(grid, rows(grid, cells(grid), PLAYED))
    # Rank 2 has more than rank 1, whatever else; that rank 2 and two differ from rank 1 and one is not said.
    assert (
        "test_accuracy, intervals of pairs that differ: rank=1, one / rank=2, one; rank=1, two / rank=2, two. "
        "All others overlap."
    ) in text


@pytest.mark.parametrize("end", ["0.001", "0.1"])
def test_what_was_chosen_at_the_end_of_what_was_offered_is_told(tmp_path: Path, end: str) -> None:
    axes = {"rank": [1, 2], "lr": [0.01, 0.001, 0.1], "seed": [0, 1]}
    choose = {"axis": "lr", "metric": "val_loss", "mode": "min"}
    grid = read_grid(grid_file(tmp_path, axes=axes, choose=choose, report={"test": ["test_accuracy"]}))
    best = {"1": end, "2": "0.01"}

    def played(run: Run) -> dict[str, Any] | None:
        found = result(run)
        loss = float(run.candidate != best[run.cell.labels["rank"]])
        return None if found is None else {**found, "validate": {"val_loss": loss}}

    text = markdown(grid, rows(grid, cells(grid), State(played, lambda run: None)))
    assert f"beyond: {end} of 0.001, 0.01, 0.1 (rank=1)." in text


def test_a_line_for_each_run(grid: Grid) -> None:
    found = list(run_lines(grid, cells(grid), PLAYED))
    assert len(found) == 9
    dead = found[-1]
    assert (dead["failure"], dead["compared"], dead["seed"]) == ("killed by SIGKILL", True, "2")
    assert found[0]["test"] == {"test_accuracy": 0.50}


def test_a_result_without_the_metric_is_an_error(tmp_path: Path) -> None:
    axes = {"rank": [1, 2], "seed": [0, 1]}
    grid = read_grid(grid_file(tmp_path, axes=axes, report={"test": ["accuracy"]}))
    with pytest.raises(PEFTError, match=r"grid.yaml: test logs no 'accuracy'. It logs test_accuracy\."):
        rows(grid, cells(grid), PLAYED)


def test_a_cell_without_the_metric_costs_the_others_nothing(grid: Grid) -> None:
    def played(run: Run) -> dict[str, Any] | None:
        found = result(run)
        return found if found is None or run.cell.labels["rank"] != "2" else {**found, "test": {"test_loss": 0.1}}

    found = rows(grid, cells(grid), State(played, PLAYED.failure))
    assert [row.metrics.keys() for row in found] == [{"test_accuracy"}, set(), {"test_accuracy"}]
    assert [row.has_failed for row in found] == [False, True, True]
    assert "- rank=2, seed=1, test_accuracy: test logs no 'test_accuracy'. It logs test_loss." in markdown(grid, found)


def test_runs_of_several_origins_are_told(grid: Grid) -> None:
    def made_from(*origins: dict[str, str]) -> str:
        def played(run: Run) -> dict[str, Any] | None:
            which = origins[min(int(run.cell.labels["rank"]), len(origins)) - 1]
            return None if (found := result(run)) is None else {**found, **({"origins": [which]} if which else {})}

        return markdown(grid, rows(grid, cells(grid), State(played, PLAYED.failure)))

    one, other = {"lightning_peft": "0.1.0 (aa)", "base": "11"}, {"lightning_peft": "0.1.0 (aa)", "base": "22"}
    assert "made from the same" not in made_from(one)
    assert "made from the same" not in made_from({})
    assert "made from the same" not in made_from(one, {"lightning_peft": "0.1.0 (aa)", "data": "33"})
    assert "Not all runs are made from the same: base 11 and 22. Remove" in made_from(one, other)
    assert "Not all runs are made from the same: lightning_peft 0.1.0 (aa) and unknown. Remove" in made_from(one, {})


def test_plots_show_means_and_intervals(grid: Grid, made: list[Row]) -> None:
    found = dict(plots(grid, made))
    assert list(found) == ["test_accuracy_by_rank", "test_accuracy_by_parameters"]
    (line,) = found["test_accuracy_by_rank"].axes[0].containers
    assert list(line.lines[0].get_xdata()) == [1, 2, 8]
    np.testing.assert_allclose(line.lines[0].get_ydata(orig=False), [0.51, 0.72, 0.72])
    points = found["test_accuracy_by_parameters"].axes[0].containers
    assert [float(point.lines[0].get_xdata()[0]) for point in points] == [100, 200, 800]


def test_plots_of_named_values(tmp_path: Path) -> None:
    bundles = {"one": {"method.alpha": 1}, "two": {"method.alpha": 2}}
    grid = read_grid(grid_file(tmp_path, axes={"rank": [1, 2], "m": bundles}, report={"test": ["test_accuracy"]}))
    figure = dict(plots(grid, rows(grid, cells(grid), PLAYED)))["test_accuracy_by_m"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["one", "two"]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["rank=1", "rank=2"]
