"""Plots of a comparison: each metric along an axis of numbers, against trained parameters, and by named values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lightning_peft.analysis.plots import require_matplotlib
from lightning_peft.comparison.grid import Grid
from lightning_peft.comparison.table import Row


def plots(grid: Grid, rows: Sequence[Row]) -> Iterator[tuple[str, Any]]:
    """Yield figures of matplotlib, each with a name for its file.

    Bars show the 95 % intervals of the means, where there are several seeds.

    Raises:
        PEFTError: matplotlib is not installed.
    """
    require_matplotlib()
    for name in (name for names in grid.report.values() for name in names):
        with_value = [row for row in rows if name in row.metrics]
        if not with_value:
            continue
        for axis in grid.compared:
            yield f"{name}_by_{axis}".replace("/", "_"), _along(grid, axis, name, with_value)
        yield f"{name}_by_parameters".replace("/", "_"), _against_parameters(name, with_value)


def _along(grid: Grid, axis: str, name: str, rows: Sequence[Row]) -> Any:
    """Draw a metric along an axis, a line for each combination of the others."""
    labels = list(grid.axes[axis])
    numbers = _numbers(labels)
    places = numbers or [float(place) for place in range(len(labels))]
    figure, axes = _axes(f"{name} by {axis}")
    groups: dict[str, list[Row]] = {}
    for row in rows:
        others = [f"{key}={value}" for key, value in row.cell.labels.items() if key != axis]
        groups.setdefault(", ".join(others), []).append(row)
    for title, group in groups.items():
        x = [places[labels.index(row.cell.labels[axis])] for row in group]
        style = "o-" if numbers else "o"
        _bars(axes, x, group, name, style, title or None)
    if numbers and min(numbers) > 0 and max(numbers) >= 8 * min(numbers):
        axes.set_xscale("log", base=2)
    axes.set_xticks(places, labels, rotation=0 if numbers else 30)
    axes.set(xlabel=axis, ylabel=name)
    if 1 < len(groups) <= 12:
        axes.legend(fontsize="small")
    return figure


def _against_parameters(name: str, rows: Sequence[Row]) -> Any:
    figure, axes = _axes(f"{name} by trained parameters")
    known = [row for row in rows if row.trained_parameters]
    for row in known:
        _bars(axes, [row.trained_parameters], [row], name, "o", row.cell.name)
    axes.set_xscale("log")
    axes.set(xlabel="trained parameters", ylabel=name)
    if len(known) <= 12:
        axes.legend(fontsize="small")
    return figure


def _bars(axes: Any, x: Sequence[Any], rows: Sequence[Row], name: str, style: str, title: str | None) -> None:
    spreads = [row.metrics[name] for row in rows]
    half = [0.0 if one.interval is None else one.interval[1] - one.mean for one in spreads]
    axes.errorbar(x, [one.mean for one in spreads], yerr=half, fmt=style, capsize=3, label=title)


def _numbers(labels: Sequence[str]) -> list[float] | None:
    try:
        return [float(label) for label in labels]
    except ValueError:
        return None


def _axes(title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    return figure, axes
