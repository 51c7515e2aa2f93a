"""A picture of the tables: one bar for each variant."""

from __future__ import annotations

from pathlib import Path

from benchmarks import variants
from benchmarks.measure import Spread
from benchmarks.report import Table, read

PANELS = {
    "step_time": ("step / bound", "time of a step / frozen bound"),
    "kept_bytes": ("/ frozen bound", "bytes kept for backward / frozen bound"),
    "peak_memory": ("/ full", "peak memory / full fine-tuning"),
    "launches": ("together", "operators launched per layer"),
    "step_time_cuda": ("step / bound", "time of a step / frozen bound, on a GPU"),
    "peak_memory_cuda": ("/ full", "peak memory / full fine-tuning, on a GPU"),
}


def draw(folder: Path) -> Path | None:
    """Draw what is in ``folder`` into a picture there; nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("agg")
    from matplotlib import pyplot

    tables = {name: read(folder / f"{name}.json") for name in PANELS if (folder / f"{name}.json").is_file()}
    figure, axes = pyplot.subplots(1, max(len(tables), 1), figsize=(5 * max(len(tables), 1), 8), squeeze=False)
    for axis, (name, table) in zip(axes[0], tables.items(), strict=False):
        labels, values = bars(table, PANELS[name][0])
        colours = ["tab:orange" if variants.OURS in label else "tab:gray" for label in labels]
        axis.barh(labels, values, color=colours)
        axis.invert_yaxis()
        axis.tick_params(axis="y", labelsize=6)
        axis.set_title(PANELS[name][1], fontsize=8)
    figure.tight_layout()
    figure.savefig(path := folder / "bench.png", dpi=150)
    pyplot.close(figure)
    return path


def bars(table: Table, column: str) -> tuple[list[str], list[float]]:
    """Return a label and a value for each row: what stands left of the first number is the label."""
    position, labels, values = list(table.columns).index(column), [], []
    for row in table.rows:
        if isinstance(value := row[position], Spread | float | int):
            labels.append(", ".join(str(cell) for cell in row[:3] if isinstance(cell, str)))
            values.append(value.median if isinstance(value, Spread) else float(value))
    return labels, values
