"""Which runs are due: candidates first, whose validation chooses for each cell, then the runs that are compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from lightning_peft.comparison.cells import Cell, Run, run_of
from lightning_peft.comparison.grid import Grid
from lightning_peft.comparison.keys import SEED

LATENCY = "latency"
Result = Mapping[str, Any]


@dataclass(frozen=True)
class State:
    """What is known of runs so far."""

    result: Callable[[Run], Result | None]
    failure: Callable[[Run], str | None]


def seeds_of(grid: Grid) -> tuple[str | None, ...]:
    """Return the labels of the seeds of each cell."""
    return tuple(grid.axes[SEED]) if SEED in grid.axes else (None,)


def candidate_runs(grid: Grid, cell: Cell) -> list[Run]:
    """Return the runs whose validation chooses for a cell; none if nothing is to be chosen."""
    if grid.choice is None or len(cell.candidates) < 2:
        return []
    seeds: tuple[str | None, ...] = grid.choice.seeds or (None,)
    return [run_of(grid, cell, candidate, seed) for candidate in cell.candidates for seed in seeds]


def compared_runs(grid: Grid, cell: Cell, state: State) -> list[Run] | None:
    """Return the runs of a cell that are compared; nothing as long as candidates are out, or if all have failed."""
    if not candidate_runs(grid, cell):
        only = next(iter(cell.candidates), None)
        return [run_of(grid, cell, only, seed) for seed in seeds_of(grid)]
    best = chosen(grid, cell, state)
    return None if best is None else [run_of(grid, cell, best, seed) for seed in seeds_of(grid)]


def chosen(grid: Grid, cell: Cell, state: State) -> str | None:
    """Return the label of the candidate with the best mean on validation data; of equal ones the first.

    A candidate that has failed or diverged, or has logged no such metric, or whose metric is no number, is not chosen.
    Nothing is chosen before all are there, and nothing but what validation has logged is looked at.
    """
    assert grid.choice is not None
    found: dict[str, list[float]] = {label: [] for label in cell.candidates}
    for run in candidate_runs(grid, cell):
        result = state.result(run)
        if result is None and state.failure(run) is None:
            return None
        logged = (result or {}).get("validate") or {}
        found[str(run.candidate)].append(float(logged.get(grid.choice.metric, math.nan)))
    sign = 1 if grid.choice.mode == "min" else -1
    means = {label: sign * fmean(values) for label, values in found.items() if all(map(math.isfinite, values))}
    return min(means, key=means.__getitem__, default=None)


def left_over(grid: Grid, cell: Cell, state: State) -> list[Run]:
    """Return the candidates of a cell that were not chosen, once one was."""
    best = chosen(grid, cell, state) if candidate_runs(grid, cell) else None
    return [run for run in candidate_runs(grid, cell) if best is not None and run.candidate != best]


def no_metric(name: str, stage: str, logged: Mapping[str, Any]) -> str:
    """Return what to say of a metric that is not logged."""
    return f"{stage} logs no {name!r}. It logs {', '.join(sorted(logged)) or 'nothing'}."


def due(grid: Grid, found: list[Cell], state: State) -> Iterator[tuple[Run, tuple[str, ...]]]:
    """Yield the runs that can be started as things are, with what their results are to hold, also those there are.

    Test data are for runs that are compared, which are known once the candidates of their cell are there.
    """
    whole = tuple(dict.fromkeys([*grid.report, *(["validate"] if grid.choice else []), LATENCY]))
    for cell in found:
        for run in candidate_runs(grid, cell):
            yield run, ("validate",)
    for cell in found:
        for run in compared_runs(grid, cell, state) or ():
            yield run, whole


def count(grid: Grid, found: list[Cell]) -> int:
    """Return how many entries :func:`due` will have in the end."""
    return sum(len(candidate_runs(grid, cell)) + len(seeds_of(grid)) for cell in found)
