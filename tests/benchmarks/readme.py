"""Stores the tables of a run beside this file, and writes what is stored into the pages.

`PYTHONPATH=tests python -m benchmarks.readme` takes the run that is in `.bench/`; of a quick one it takes nothing.
The page of benchmarks gets every table, between the marks `<!-- bench: NAME -->` and `<!-- /bench -->`; the README gets
the headlines, between `<!-- headlines: … -->` and `<!-- /headlines -->`, and `headline.svg` is their picture.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks import headline
from benchmarks.report import OUT, Table, read, write

HERE = Path(__file__).resolve().parent
STORED = HERE / "tables"
PAGE = HERE / "README.md"
PICTURE = HERE / "headline.svg"
README = HERE.parents[1] / "README.md"
TABLE = re.compile(r"(<!-- bench: (\w+) -->\n)(.*?)(<!-- /bench -->)", flags=re.DOTALL)
HEADLINES = re.compile(r"(<!-- headlines: .*? -->\n)(.*?)(<!-- /headlines -->)", flags=re.DOTALL)


def tables_in(folder: Path) -> dict[str, Table]:
    """Return the tables of a folder by name."""
    return {path.stem: read(path) for path in sorted(folder.glob("*.json"))}


def pages(tables: Mapping[str, Table]) -> dict[Path, str]:
    """Return what each file should hold when ``tables`` are stored."""
    page = TABLE.sub(lambda place: f"{place[1]}{tables[place[2]].markdown()}{place[4]}", PAGE.read_text())
    before, mark, _, end, after = HEADLINES.split(README.read_text())
    readme = before + mark + headline.markdown(tables) + end + after
    return {PAGE: page, README: readme, PICTURE: headline.picture(tables)}


def main(run: Path) -> None:
    """Store the tables of ``run`` and write the pages, or change nothing if a headline would be lost."""
    measured = {name: table for name, table in tables_in(run).items() if not table.quick}
    tables = {**tables_in(STORED), **measured}
    made = pages(tables)
    for table in measured.values():
        write(table, STORED)
    for path, text in made.items():
        path.write_text(text)
    print(f"Tables of {run} that were stored: {', '.join(measured) or 'none'}.")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else OUT)
