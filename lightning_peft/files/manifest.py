"""What a directory was when it was written: the size and SHA-256 of every file, and what they are about.

It stands in a file beside them, which other readers pass over. What it lists has to be there, bit for bit; what is
added later is nobody's business, unless it would be read with the rest.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from lightning_peft.errors import PEFTError
from lightning_peft.files.contents import inside, read_json, write_json

MANIFEST = "lightning_peft_manifest.json"

_VERSION = 1
_PACKAGES = ("lightning_peft", "lightning", "torch")
_CHUNK = 2**20
_LEVELS = 2
"""How far below a directory with a manifest another one may stand that is loaded by itself."""


class _Manifest(NamedTuple):
    place: Path
    step: Any
    files: Mapping[Path, Mapping[str, Any]]
    """What is said of each file of a directory."""


def write_manifest(directory: Path, about: Mapping[str, Any]) -> None:
    """List the files that are in ``directory``.

    Args:
        directory: One that is written, and not yet in its place.
        about: What else to say of it, in plain values.
    """
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(_sha256, paths))
    files = {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, hashes, strict=True)
    }
    write_json(directory / MANIFEST, {"version": _VERSION, **about, "versions": _versions(), "files": files})


def check_manifest(directory: Path, read: Collection[str] | None = None) -> None:
    """Check that the files of ``directory`` are those that were written. Without a manifest, nothing is known of them.

    Args:
        directory: One that was written, or a part of it.
        read: The names of the files that will be read; all, if not given.

    Raises:
        PEFTError: One is missing, is another one, or was added.
    """
    directory = directory.absolute()
    if (manifest := _manifest_of(directory)) is None:
        return
    for file, entry in manifest.files.items():
        if (read is None or file.name in read) and (fault := _fault(file, entry)):
            raise _error(file, fault, manifest)
    for file in sorted(directory / name for name in read or ()):
        if file.is_file() and file not in manifest.files:
            raise _error(file, "was added since, and would be read", manifest)


def _manifest_of(directory: Path) -> _Manifest | None:
    for folder in (directory, *directory.parents[:_LEVELS]):
        if not (place := folder / MANIFEST).is_file():
            continue
        content = read_json(place)
        listed = content.get("files")
        if content.get("version") != _VERSION or not isinstance(listed, dict):
            raise PEFTError(f"{place} is damaged, or of a newer lightning_peft. Take another copy of {folder}.")
        files = {inside(folder, name): entry for name, entry in listed.items() if isinstance(entry, dict)}
        files = {path: entry for path, entry in files.items() if directory in path.parents}
        if files or folder == directory:
            return _Manifest(place, content.get("step"), files)
    return None


def _fault(file: Path, entry: Mapping[str, Any]) -> str | None:
    """Return what is wrong with ``file``."""
    if not file.is_file():
        return "is missing"
    if (size := file.stat().st_size) != entry.get("bytes"):
        return f"has {size} bytes instead of {entry.get('bytes')}"
    return None if _sha256(file) == entry.get("sha256") else "has another content"


def _error(file: Path, fault: str, manifest: _Manifest) -> PEFTError:
    if not file.is_file():
        return PEFTError(f"{file} is missing: {manifest.place} says that it was written. Take another copy.")
    step = "" if manifest.step is None else f" at step {manifest.step}"
    return PEFTError(
        f"{file} {fault}: it is not what was written{step}, so it is damaged, or belongs to another checkpoint. Take "
        f"another copy. If you changed it on purpose, remove {manifest.place}, which says what was written."
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # put on the path by hand
            continue
    return found
