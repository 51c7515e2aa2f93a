"""What a result was made from: the code, and the files that its config names. Of another origin is another result."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).parents[1]
_WHOLE, _PIECE = 2**26, 2**20
"""Files of so many bytes are read as a whole; of larger ones so many at each end."""
_FILES = 1000
"""Of a directory with more, the first by name; what lies in directories below is not looked at."""
_WRITTEN = frozenset({"dirpath", "save_dir", "cache_dir", "default_root_dir"})
"""Keys of a config under which a run writes."""


def origin(config: Mapping[str, Any]) -> dict[str, str]:
    """Return what a run of ``config`` is made from: a version or a digest, by the name of what it is of.

    A digest of a file of more than 64 MiB is one of its size and of the mebibyte at each end.
    """
    read = [config.get("model"), config.get("data"), (config.get("trainer") or {}).get("callbacks")]
    return {
        "lightning_peft": f"{importlib.metadata.version('lightning_peft')} ({_code()})",
        "torch": torch.__version__,
        **{path: _digest(_files(Path(path))) for path in sorted(set(_paths(read)))},
    }


def differing(origins: Iterable[Mapping[str, str]]) -> dict[str, list[str]]:
    """Return what is not the same in all of ``origins`` that name it, with its values.

    Of what was measured before origins were noted, the code is ``unknown``.
    """
    found = [each or {"lightning_peft": "unknown"} for each in origins]
    values = {name: sorted({each[name] for each in found if name in each}) for each in found for name in each}
    return {name: several for name, several in values.items() if len(several) > 1}


@cache
def _code() -> str:
    return _digest(sorted(_PACKAGE.rglob("*.py")))


def _paths(value: Any) -> Iterator[str]:
    """Yield the texts in a config that are paths of what is there."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if name not in _WRITTEN:
                yield from _paths(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _paths(inner)
    elif isinstance(value, str) and value:
        with suppress(OSError, ValueError):  # a text that is no path: too long, or with characters that none has
            path = Path(value)
            # Not "." or "/", which may end sentences; and what is around a run is not what it reads.
            if path.is_file() or (path.is_dir() and not Path.cwd().is_relative_to(path.resolve())):
                yield value


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())[:_FILES]


def _digest(files: Iterable[Path]) -> str:
    found = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        found.update(f"{file.name}\0{size}\0".encode())
        # What cannot be read, a run will not have read; or it will say so itself.
        with suppress(OSError), file.open("rb") as opened:
            found.update(opened.read(_WHOLE if size <= _WHOLE else _PIECE))
            opened.seek(max(0, size - _PIECE))
            found.update(opened.read(_PIECE))
    return found.hexdigest()[:12]
