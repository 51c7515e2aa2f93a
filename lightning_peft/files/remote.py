"""Files of other file systems, such as ``s3://…``, which Lightning reads and writes by way of fsspec."""

from __future__ import annotations

import os
from typing import Any, BinaryIO, cast


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a URL."""
    return "://" in os.fspath(path)


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether there is a file at ``path``, here or elsewhere, of which parts can be read.

    A web server need not give parts: what it has is read by Lightning from beginning to end, and not looked into.
    """
    if not is_remote(path):
        return os.path.isfile(path)
    if os.fspath(path).startswith(("http://", "https://")):
        return False
    system, place = _system(path)
    return bool(system.isfile(place))


def opened(path: str | os.PathLike[str]) -> BinaryIO:
    """Open the file at ``path``, here or elsewhere, to read it."""
    if not is_remote(path):
        return open(path, "rb")
    system, place = _system(path)
    return cast("BinaryIO", system.open(place, "rb"))


def _system(path: str | os.PathLike[str]) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    found: tuple[Any, str] = url_to_fs(os.fspath(path))
    return found
