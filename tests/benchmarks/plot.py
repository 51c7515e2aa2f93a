"""Pictures of tables as SVG: panels of bars."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import zip_longest
from pathlib import Path

from benchmarks import variants
from benchmarks.measure import Spread
from benchmarks.report import Table, read

TABLES = {
    "step_time": ("step / bound", "time of a step / frozen bound"),
    "kept_bytes": ("/ frozen bound", "bytes kept for backward / frozen bound"),
    "peak_memory": ("/ full", "peak memory / full fine-tuning"),
    "launches": ("together", "operators launched per layer"),
    "step_time_cuda": ("step / bound", "time of a step / frozen bound, on a GPU"),
    "peak_memory_cuda": ("/ full", "peak memory / full fine-tuning, on a GPU"),
}
"""The tables that a run's picture shows: which column, and what it is."""
OURS, OTHERS = "#e8710a", "#9aa0a6"
# In pixels: of a line, of a letter, of the longest bar and the figure behind it, between panels.
LINE, LETTER, BAR, FIGURE, GAP = 15, 6, 120, 36, 18


@dataclass(frozen=True)
class Panel:
    """Bars under a title, and what is written beside each."""

    title: str
    bars: Sequence[tuple[str, float]]


def draw(panels: Sequence[Panel], columns: int) -> str:
    """Return an SVG of ``panels``, so many in a row."""
    label = max(len(name) for panel in panels for name, _ in panel.bars) * LETTER
    width = label + BAR + FIGURE + GAP
    body, top = [], GAP
    for row in zip_longest(*[iter(panels)] * columns):
        shown = [panel for panel in row if panel]
        for number, panel in enumerate(shown):
            body += _panel(panel, GAP + number * width, top, label)
        top += (1 + max(len(panel.bars) for panel in shown)) * LINE + GAP
    size = f'width="{GAP + min(columns, len(panels)) * width}" height="{top}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *body, "</svg>\n"])


def _panel(panel: Panel, left: int, top: int, label: int) -> Iterator[str]:
    longest = max(value for _, value in panel.bars)
    yield f'<text x="{left}" y="{top + 4}" font-weight="bold">{escape(panel.title)}</text>'
    for number, (name, value) in enumerate(panel.bars, start=1):
        middle, length = top + number * LINE, round(BAR * value / longest)
        colour = OURS if variants.OURS in name else OTHERS
        yield f'<text x="{left + label}" y="{middle + 4}" text-anchor="end">{escape(name)}</text>'
        yield f'<rect x="{left + label + 4}" y="{middle - 5}" width="{length}" height="10" fill="{colour}"/>'
        yield f'<text x="{left + label + length + 8}" y="{middle + 4}">{value:.2f}</text>'


def draw_run(folder: Path) -> Path | None:
    """Draw the tables of a run into a picture beside them, if it has any to draw."""
    found = {name: folder / f"{name}.json" for name in TABLES}
    panels = [panel_of(read(path), *TABLES[name]) for name, path in found.items() if path.is_file()]
    if not panels:
        return None
    (path := folder / "bench.svg").write_text(draw(panels, len(panels)))
    return path


def panel_of(table: Table, column: str, title: str) -> Panel:
    """Return a bar for each row that has a number in ``column``; its label is the texts that the row begins with."""
    position = list(table.columns).index(column)
    labels = [", ".join(str(cell) for cell in row[:3] if isinstance(cell, str)) for row in table.rows]
    cells = [row[position] for row in table.rows]
    return Panel(
        title, [(label, number(cell)) for label, cell in zip(labels, cells, strict=True) if not isinstance(cell, str)]
    )


def number(cell: Spread | float | int) -> float:
    """Return the one number that stands for a cell."""
    return cell.median if isinstance(cell, Spread) else float(cell)
