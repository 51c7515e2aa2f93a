"""The few figures that the README shows, chosen from the stored tables: as a small table, and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks import variants
from benchmarks.plot import Panel, draw, number
from benchmarks.report import Table, grid

SHOWN = (variants.OURS, variants.PEFT, "loralib", "LitGPT", variants.FULL)
STEP = "step / bound"


@dataclass(frozen=True)
class Headline:
    """One figure of each variant: that of the row which has the variant and ``cells`` among its texts."""

    what: str
    table: str
    cells: tuple[str, ...]
    column: str
    counted: bool = False
    """Not measured, and so the same on every machine."""

    def figures(self, tables: Mapping[str, Table]) -> dict[str, float]:
        """Return the figure of each variant that the table has.

        Raises:
            LookupError: It has none of ours.
        """
        table, found = tables[self.table], {}
        for row in table.rows:
            texts = {cell for cell in row if isinstance(cell, str)}
            for variant in texts & set(SHOWN) if texts.issuperset(self.cells) else ():
                found[variant] = number(row[list(table.columns).index(self.column)])
        if variants.OURS not in found:
            raise LookupError(f"The table {self.table} has no row with {', '.join([*self.cells, variants.OURS])}.")
        return {variant: found[variant] for variant in SHOWN if variant in found}


HEADLINES = (
    Headline("GPU step, Llama-7B", "step_time_cuda", ("Llama-7B, 4 layers, 4,096 tokens", "0"), STEP),
    Headline("GPU step, Llama-7B, dropout 0.05", "step_time_cuda", ("Llama-7B, 4 layers, 4,096 tokens", "0.05"), STEP),
    Headline("GPU step, SmolLM2-135M", "step_time_cuda", ("SmolLM2-135M, 8 layers, 4 x 2,048 tokens", "0"), STEP),
    Headline("GPU step, MiniLM", "step_time_cuda", ("MiniLM encoder, 4 x 128 tokens", "0"), STEP),
    Headline("GPU peak memory, Llama-7B", "peak_memory_cuda", ("Llama-7B, 2 layers, 4,096 tokens",), "/ full"),
    Headline("CPU step, Llama-7B", "step_time", ("Llama-7B, 1 layer", "0"), STEP),
    Headline("CPU step, SmolLM2-135M", "step_time", ("SmolLM2-135M, 8 layers", "0"), STEP),
    Headline("kept bytes, Llama-7B, dropout 0.05", "kept_bytes", ("Llama-7B, 1 layer", "0.05"), "/ frozen bound", True),
    Headline("kernels beside a layer of Llama", "launches", ("average in a Llama block",), "together", True),
)


def markdown(tables: Mapping[str, Table]) -> str:
    """Return the table: a line for each headline, a column for each variant, and what was measured on."""
    rows = []
    for headline in HEADLINES:
        figures = headline.figures(tables)
        cells = [f"{figures[variant]:.2f}" if variant in figures else "-" for variant in SHOWN]
        machine = "any (counted)" if headline.counted else tables[headline.table].machine.partition(",")[0]
        rows.append([headline.what, *cells, machine])
    return grid(["", *SHOWN, "on"], rows) + "\n"


def picture(tables: Mapping[str, Table]) -> str:
    """Return the SVG: a panel for each headline."""
    panels = [Panel(headline.what, list(headline.figures(tables).items())) for headline in HEADLINES]
    return draw(panels, columns=3)
