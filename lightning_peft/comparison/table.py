"""The result of a comparison: rows with means over seeds, as a Markdown table, as JSON, and run by run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from lightning_peft.comparison.cells import Cell, Run
from lightning_peft.comparison.choosing import State, candidate_runs, chosen, compared_runs, no_metric
from lightning_peft.comparison.grid import Grid
from lightning_peft.comparison.origins import differing
from lightning_peft.comparison.statistics import Spread, overlap, spread
from lightning_peft.errors import PEFTError

_MIB = 2**20


@dataclass(frozen=True)
class Row:
    """A cell of the table."""

    cell: Cell
    chosen: str | None
    metrics: Mapping[str, Spread]
    """By name, of the seeds that have a value; none of a cell without any."""
    trained_parameters: int | None
    seconds_per_step: float | None
    """The median over seeds of each run's median."""
    peak_memory: int | None
    """In bytes, the largest."""
    bytes: int | None
    latency: float | None
    """Seconds of a forward pass, merged if the method merges; median over seeds."""
    base_latency: float | None
    merges: bool | None
    at_the_end: str | None
    """What was offered, if it is numbers and the lowest or the highest of them was chosen."""
    origins: tuple[Mapping[str, str], ...]
    """What its runs were made from."""
    faults: tuple[str, ...]
    """In one line each, what failed and what diverged."""
    has_failed: bool
    """Whether a run of it failed or lacks a metric, or none of its candidates could be chosen."""


def rows(grid: Grid, found: list[Cell], state: State) -> list[Row]:
    """Return a row for each cell, from the results that there are.

    Raises:
        PEFTError: There are results, and none of them has a metric that is to be reported.
    """
    made = [_row(grid, cell, state) for cell in found]
    runs = [run for cell in found for run in compared_runs(grid, cell, state) or ()]
    for stage, names in grid.report.items():
        there = [result[stage] for run in runs if stage in (result := state.result(run) or {})]
        for name in names:
            if there and not any(name in logged for logged in there):
                raise PEFTError(f"{grid.source}: {no_metric(name, stage, there[0])}")
    return made


def _row(grid: Grid, cell: Cell, state: State) -> Row:
    candidates, compared = candidate_runs(grid, cell), compared_runs(grid, cell, state)
    faults = {run.name: said for run in [*candidates, *(compared or ())] if (said := _fault(run, state))}
    failed = [run for run in [*candidates, *(compared or ())] if state.failure(run)]
    if compared is None:
        assert grid.choice is not None
        faults[cell.name] = f"none of its candidates has a {grid.choice.metric} to choose by"
    results = [
        (run, result)
        for run in compared or ()
        if (result := state.result(run)) and not result.get("diverged") and all(s in result for s in grid.report)
    ]
    metrics = dict[str, Spread]()
    lacking = dict[str, str]()
    for stage, names in grid.report.items():
        for name in names:
            if values := [float(result[stage][name]) for _, result in results if name in result[stage]]:
                metrics[name] = spread(values)
            lacking |= {
                f"{run.name}, {name}": no_metric(name, stage, result[stage])
                for run, result in results
                if name not in result[stage]
            }
    faults |= lacking

    def each(key: str) -> list[Any]:
        return [result[key] for _, result in results if result.get(key) is not None]

    def of_calls(key: str) -> list[Any]:
        return [found[key] for found in each("latency") if found[key] is not None]

    best = chosen(grid, cell, state) if candidates else next(iter(cell.candidates), None)
    return Row(
        cell,
        best,
        metrics,
        max(each("trained_parameters"), default=None),
        _median(each("seconds_per_step")),
        max(each("peak_memory"), default=None),
        max(each("bytes"), default=None),
        _median(of_calls("seconds")),
        _median(of_calls("base_seconds")),
        next(iter(of_calls("merges")), None),
        _offered(best, cell) if candidates else None,
        tuple(one for _, result in results for one in result.get("origins", [{}])),
        tuple(f"{name}: {said}" for name, said in faults.items()),
        bool(failed) or bool(lacking) or compared is None,
    )


def _fault(run: Run, state: State) -> str | None:
    result = state.result(run)
    if result is not None and result.get("diverged"):
        return f"diverged after {result['steps']} steps ({result['diverged']})"
    failure = state.failure(run)
    return None if failure is None else f"failed: {failure} (log: {run.directory / 'log.txt'})"


def _offered(best: str | None, cell: Cell) -> str | None:
    """Return the candidates of a cell if they are numbers, and ``best`` is the lowest or the highest."""
    try:
        numbers = {label: float(label) for label in cell.candidates}
    except ValueError:
        return None
    if best is None or min(numbers.values()) < numbers[best] < max(numbers.values()):
        return None
    return ", ".join(sorted(numbers, key=numbers.__getitem__))


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def markdown(grid: Grid, found: Sequence[Row]) -> str:
    """Return the table as Markdown, with what intervals say of pairs, and with what failed."""
    names = [name for stage in grid.report.values() for name in stage]
    axes = list(grid.compared)
    heading = [*axes, *([grid.choice.axis] if grid.choice else []), "seeds", *names]
    heading += ["trained", "s / step", "peak MiB", "kept bytes", "forward ms", "of base"]
    lines = [heading, ["---"] * len(heading)]
    for row in found:
        line = [*row.cell.labels.values(), *([row.chosen or "-"] if grid.choice else [])]
        line.append(str(max((len(spread.values) for spread in row.metrics.values()), default=0)))
        line += [_spread(row.metrics.get(name)) for name in names]
        line += [_number(row.trained_parameters), _decimal(row.seconds_per_step)]
        line += [_number(None if row.peak_memory is None else round(row.peak_memory / _MIB)), _number(row.bytes)]
        line += [_forward(row), _decimal(None if row.base_latency is None else 1e3 * row.base_latency)]
        lines.append(line)
    text = "\n".join(f"| {' | '.join(part.replace('|', chr(92) + '|') for part in line)} |" for line in lines)
    below = [*_ends(grid, found), *_overlaps(names, found), *_origins(found), *_faults(found)]
    parts = [text, _legend(grid, found), *below]
    return "\n\n".join(part for part in parts if part) + "\n"


def _legend(grid: Grid, found: Sequence[Row]) -> str:
    said = "Metrics: mean ± standard deviation over seeds [95 % t-interval of the mean]."
    if grid.choice:
        seeds = f", seed {', '.join(grid.choice.seeds)}" if grid.choice.seeds else ""
        said += f" {grid.choice.axis}: chosen by {grid.choice.mode} {grid.choice.metric} on validation data{seeds}."
    if any(row.latency is not None for row in found):
        said += " forward ms: merged, or with the adapters beside the model (*) where they do not merge."
    return said


def _ends(grid: Grid, found: Sequence[Row]) -> Iterator[str]:
    """Say where a better value may lie beyond what was offered."""
    ends: dict[str, list[str]] = {}
    for row in found:
        if row.at_the_end is not None:
            ends.setdefault(f"{row.chosen} of {row.at_the_end}", []).append(row.cell.name)
    if grid.choice and ends:
        cells = [f"{what} ({'all' if len(names) == len(found) else '; '.join(names)})" for what, names in ends.items()]
        yield (
            f"{grid.choice.axis}: the lowest or the highest that was offered is the best, and a better one may lie "
            f"beyond: {', '.join(cells)}."
        )


def _overlaps(names: Sequence[str], found: Sequence[Row]) -> Iterator[str]:
    """Say of each metric which intervals overlap, of cells that differ in one axis: others differ in too much."""
    alike = [pair for pair in itertools.combinations(found, 2) if len(_differing(*pair)) == 1]
    for name in names:
        apart: list[str] = []
        joined: list[str] = []
        unknown = 0
        for first, second in alike:
            both = overlaps(first, second, name)
            unknown += both is None
            pair = f"{first.cell.name} / {second.cell.name}"
            if both is not None:
                (joined if both else apart).append(pair)
        if not apart and not joined:
            yield f"{name}: no intervals to compare, for want of seeds."
            continue
        more = f" {unknown} pairs have no intervals." if unknown else ""
        if apart and joined:
            rare = (apart, "differ", "overlap") if len(apart) <= len(joined) else (joined, "overlap", "differ")
            yield f"{name}, intervals of pairs that {rare[1]}: {'; '.join(rare[0])}. All others {rare[2]}.{more}"
        else:
            yield f"{name}, intervals of pairs: all {'differ' if apart else 'overlap'}.{more}"


def _differing(first: Row, second: Row) -> list[str]:
    return [axis for axis, label in first.cell.labels.items() if second.cell.labels[axis] != label]


def overlaps(first: Row, second: Row, name: str) -> bool | None:
    """Whether the intervals of a metric of two rows overlap; nothing if there are none."""
    mine, other = first.metrics.get(name), second.metrics.get(name)
    return None if mine is None or other is None else overlap(mine, other)


def _origins(found: Sequence[Row]) -> Iterator[str]:
    if several := differing(origin for row in found for origin in row.origins):
        listed = "; ".join(f"{name} {' and '.join(values)}" for name, values in several.items())
        yield f"Not all runs are made from the same: {listed}. Remove a run's directory to have it made anew."


def _faults(found: Sequence[Row]) -> Iterator[str]:
    if faults := [fault for row in found for fault in row.faults]:
        yield "Not in these means:\n\n" + "\n".join(f"- {fault}" for fault in faults)


def as_json(grid: Grid, found: Sequence[Row]) -> list[dict[str, Any]]:
    """Return a JSON object for each row."""
    names = [name for stage in grid.report.values() for name in stage]
    return [
        {
            "cell": row.cell.name,
            **{"axes": dict(row.cell.labels), "chosen": row.chosen},
            "metrics": {name: _json(found_spread) for name, found_spread in row.metrics.items()},
            **{"trained_parameters": row.trained_parameters, "seconds_per_step": row.seconds_per_step},
            **{"peak_memory": row.peak_memory, "bytes": row.bytes},
            **{"latency": row.latency, "base_latency": row.base_latency, "merges": row.merges},
            "overlaps": {
                name: {
                    other.cell.name: both
                    for other in found
                    if other is not row and (both := overlaps(row, other, name)) is not None
                }
                for name in names
            },
            "faults": list(row.faults),
        }
        for row in found
    ]


def run_lines(grid: Grid, found: list[Cell], state: State) -> Iterator[dict[str, Any]]:
    """Yield a JSON object for each run that there is or that failed: candidates, then what is compared."""
    for cell in found:
        compared = {run.directory: run for run in compared_runs(grid, cell, state) or ()}
        runs = {run.directory: run for run in candidate_runs(grid, cell)} | compared
        for directory, run in runs.items():
            result, failure = state.result(run), state.failure(run)
            if result is None and failure is None:
                continue
            line = {"cell": cell.name, "axes": dict(cell.labels), "candidate": run.candidate, "seed": run.seed}
            about = {"compared": directory in compared, "directory": str(directory), "failure": failure}
            yield (
                line
                | about
                | {key: value for key, value in (result or {}).items() if key not in ("name", "fingerprint")}
            )


def _json(found: Spread) -> dict[str, Any]:
    return {
        "mean": found.mean,
        "deviation": found.deviation,
        "interval": None if found.interval is None else list(found.interval),
        "values": list(found.values),
    }


def _spread(found: Spread | None) -> str:
    if found is None:
        return "-"
    if found.deviation is None or found.interval is None:
        return f"{found.mean:.4g}"
    low, high = found.interval
    return f"{found.mean:.4g} ± {found.deviation:.2g} [{low:.4g}, {high:.4g}]"


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _forward(row: Row) -> str:
    return "-" if row.latency is None else f"{1e3 * row.latency:.3g}{'' if row.merges else '*'}"
