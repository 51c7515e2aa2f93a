"""Writing a directory so that a crash at any moment leaves the old or the new one whole; reading strangers' files."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_peft.errors import PEFTError

MARKER = "lightning_peft.json"
"""The file that makes a directory ours to overwrite."""

_ASIDE = ".old"
_ATTEMPTS = 100
_MAX_JSON_BYTES = 16 * 2**20


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary sibling to write into; on success it takes the place of ``path``, on failure it goes.

    Raises:
        PEFTError: ``path`` exists and is not a directory written by this package, or cannot be written to.
    """
    target = Path(os.path.abspath(path))
    staging = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        restore_interrupted(target)
        _refuse_foreign(target)
        staging.mkdir(parents=True)
        yield staging
        for file in [*staging.rglob("*"), staging]:
            _fsync(file)
        _replace(staging, target)
    except OSError as error:
        raise PEFTError(
            f"Cannot write {target}: {error.strerror or error}. Check the path, its permissions and the free space."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _refuse_foreign(target: Path) -> None:
    try:
        names = os.listdir(target)
    except FileNotFoundError:
        return
    except NotADirectoryError:
        names = [target.name]
    if names and MARKER not in names:
        raise PEFTError(
            f"{target} exists and was not written by lightning_peft: it is not overwritten. Choose another path, or "
            "remove it."
        )


def restore_interrupted(path: str | os.PathLike[str]) -> None:
    """Bring back the old directory if a crash came between moving it aside and putting the new one in its place."""
    target = Path(os.path.abspath(path))
    aside = _aside(target)
    if aside.is_dir() and not target.exists():
        with suppress(OSError):
            aside.rename(target)


def restore_all_interrupted(directory: str | os.PathLike[str]) -> None:
    """Do the same for every directory that was written in ``directory``."""
    for aside in Path(directory).glob(_aside(Path("*")).name):
        restore_interrupted(aside.with_name(aside.name[1 : -len(_ASIDE)]))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write ``tensors`` as safetensors, with the metadata that HF PEFT writes."""
    # A view (a slice, a transpose, a shard of a flat parameter) has to become a tensor of its own.
    save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, path, metadata={"format": "pt"})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as readable JSON."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        PEFTError: The file is missing, too large, damaged, or holds no object.
    """
    _require_file(path)
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise PEFTError(f"{path} has {path.stat().st_size} bytes; {_MAX_JSON_BYTES} is the limit for a configuration.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise PEFTError(f"{path} is not valid JSON: {error}. The file is damaged; take another copy.") from error
    if not isinstance(content, dict):
        raise PEFTError(f"{path} holds a {type(content).__name__}; a JSON object was expected.")
    return content


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a safetensors file, without reading the tensors.

    Raises:
        PEFTError: The file is missing or damaged.
    """
    with open_tensors(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no dict)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        PEFTError: The file is missing or damaged.
    """
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file to read tensors one by one.

    Raises:
        PEFTError: The file is missing or damaged.
    """
    _require_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise PEFTError(f"{path} is damaged or truncated: {error}. Take another copy.") from error


def inside(directory: Path, name: str) -> Path:
    """Return the path of the file that ``directory`` itself names so.

    Raises:
        PEFTError: It lies outside of ``directory``.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise PEFTError(f"{directory} names the file {name!r}, which lies outside of it. It is not read.")
    return directory / name


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise PEFTError(
            f"{path} does not exist. An adapter is a directory with adapter_config.json and adapter_model.safetensors."
        )


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}{_ASIDE}")


def _replace(staging: Path, target: Path) -> None:
    # No portable call exchanges two directories: the old one steps aside for the moment between two renames, and
    # `restore_interrupted` brings it back after a crash in that moment.
    aside = _aside(target)
    for left in reversed(range(_ATTEMPTS)):
        try:
            shutil.rmtree(aside, ignore_errors=True)
            if target.exists():
                target.rename(aside)
            staging.rename(target)
            break
        except OSError:
            # Processes that write one adapter to one path come in between each other's renames.
            if not left or not staging.exists():
                raise
    _fsync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _fsync(path: Path) -> None:
    # Without it a power cut may leave renamed but empty files. Windows cannot open a directory.
    flags = os.O_RDONLY
    try:
        descriptor = os.open(path, flags)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
