"""Writes the tables of a run into the README, between the marks `<!-- bench: NAME -->` and `<!-- /bench -->`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from benchmarks.report import OUT, read

README = Path(__file__).resolve().parents[2] / "README.md"
PLACE = re.compile(r"(<!-- bench: (\w+) -->\n)(.*?)(<!-- /bench -->)", flags=re.DOTALL)


def filled(text: str, folder: Path) -> str:
    """Return ``text`` with the table of each place that ``folder`` has one for."""

    def fill(place: re.Match[str]) -> str:
        path = folder / f"{place[2]}.json"
        return f"{place[1]}{read(path).markdown()}{place[4]}" if path.is_file() else place[0]

    return PLACE.sub(fill, text)


if __name__ == "__main__":
    README.write_text(filled(README.read_text(), Path(sys.argv[1]) if len(sys.argv) > 1 else OUT))
