"""What a question answers, as JSON, as Markdown, and on the command line."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Spread

OUT = Path(__file__).resolve().parents[2] / ".bench"
MB = 1e6


@dataclass(frozen=True)
class Options:
    quick: bool
    rounds: int
    device: str
    out: Path
    model: str = ""
    """What the name of a model has to hold; all models if it is empty."""

    @property
    def dtype(self) -> torch.dtype:
        """What models compute in on this device."""
        return torch.float32 if self.device == "cpu" else torch.bfloat16


@dataclass
class Table:
    """Rows of one question. A cell is a text, a number, or a :class:`Spread` of ratios."""

    name: str
    title: str
    columns: Sequence[str]
    rows: list[list[Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    machine: str = ""
    """What it was measured on."""
    quick: bool = False
    """Measured on small models, in few rounds: it says that a question runs, not what the answer is."""

    def markdown(self) -> str:
        on = [f"On {self.machine}."] if self.machine else []
        return "\n\n".join([f"**{self.title}**", grid(self.columns, self.rows), *on, *self.notes]) + "\n"


def grid(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return rows under their head, in Markdown."""
    lines = [columns, ["---"] * len(columns), *[[text(cell) for cell in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def text(cell: Any) -> str:
    """Return a cell as it is shown."""
    if not isinstance(cell, float | int):
        return str(cell)
    return f"{cell:,.3g}" if isinstance(cell, float) and abs(cell) < 1000 else f"{cell:,.0f}"


def answer(question: Callable[[Options], list[Table]]) -> None:
    """Run one question from the command line: print its tables and write them as JSON."""
    parser = argparse.ArgumentParser(description=(question.__doc__ or "").strip())
    parser.add_argument("--quick", action="store_true", help="small models and few rounds, to see that it runs")
    parser.add_argument("--rounds", type=int, help="how often every variant has its turn")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--model", default="", help="only models whose name holds this; rows of others stay")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for JSON")
    given = parser.parse_args()
    rounds = given.rounds or (2 if given.quick else 5 if given.device == "cpu" else 15)
    options = Options(given.quick, rounds, given.device, given.out, given.model)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for table in question(options):
        if given.device != "cpu":
            # Beside the CPU's table, not in its place.
            table.name += f"_{given.device}"
        table.machine, table.quick = machine(given.device), given.quick
        print(table.markdown(), flush=True)
        write(with_others(table, options) if given.model else table, options.out)


def with_others(table: Table, options: Options) -> Table:
    """Return ``table`` with the rows that a run has written of other models, on the same machine."""
    file = options.out / f"{table.name}.json"
    earlier = json.loads(file.read_text()) if file.exists() else {}
    if (earlier.get("machine"), earlier.get("quick")) != (table.machine, table.quick):
        return table
    known = {row[0] for row in table.rows}
    return replace(table, rows=[*(row for row in earlier["rows"] if row[0] not in known), *table.rows])


def machine(device: str) -> str:
    """Describe what was measured on."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return f"{torch.get_num_threads()} threads of {names[0] if names else 'a CPU'}, torch {torch.__version__}"


def write(table: Table, folder: Path) -> None:
    """Write a table as JSON, a row a line."""
    rows = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in asdict(table)["rows"])
    rest = json.dumps({**asdict(table), "rows": []}, indent=1, ensure_ascii=False)
    (folder / f"{table.name}.json").write_text(rest.replace('"rows": []', f'"rows": [\n  {rows}\n ]') + "\n")


def read(path: Path) -> Table:
    """Read a table back from JSON."""
    content = json.loads(path.read_text())
    rows = [[Spread(**cell) if isinstance(cell, dict) else cell for cell in row] for row in content.pop("rows")]
    return Table(**content, rows=rows)


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
