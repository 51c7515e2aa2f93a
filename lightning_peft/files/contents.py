"""The files in a directory: tensors as safetensors, and JSON. Those that are read may be strangers'."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_peft.errors import PEFTError, shown

MARKER = "lightning_peft.json"
"""The file that makes a directory ours to overwrite."""

_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
BROKEN_PICKLE = (LookupError, TypeError, AttributeError, OverflowError, AssertionError)
"""What ``torch.load`` lets through where the instructions of a pickle make no sense."""

_MAX_JSON_BYTES = 8 * 2**20


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write ``tensors`` as safetensors, with the metadata that HF PEFT writes.

    Raises:
        PEFTError: One of them is sparse, or the file could not be read again.
    """
    if sparse := [name for name, tensor in tensors.items() if tensor.layout is not torch.strided]:
        raise PEFTError(
            f"{sparse[0]!r} has changed and is sparse, which safetensors files cannot hold. Checkpoints of a Trainer "
            "have it; for a directory of the adapter alone make it dense, or register it with persistent=False."
        )
    refuse_unreadable_name(path)
    save_file(_apart(tensors), path, metadata={"format": "pt"})


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``tensors`` without the memory that they share: a view (a slice, a transpose) becomes one of its own."""
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        memory = own.untyped_storage().data_ptr()
        found[name] = own.clone() if memory in taken else own
        taken.add(memory)
    return found


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
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise PEFTError(f"{path} is not valid JSON: {error}. The file is damaged; take another copy.") from error
    if not isinstance(content, dict):
        raise PEFTError(f"{path} holds a {type(content).__name__}; a JSON object was expected.")
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON, in which no key stands twice: readers would take one value or the other."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f"{twice!r} stands twice in one object")
    return found


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a safetensors file, without reading the tensors.

    Raises:
        PEFTError: The file is missing or damaged.
    """
    with open_tensors(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no dict)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file or, if there is none, what ``torch.save`` wrote under its name with ``.bin``.

    Raises:
        PEFTError: The file is missing or damaged, or a ``.bin`` file holds anything but tensors by name.
    """
    if not path.is_file() and (older := path.with_suffix(".bin")).is_file():
        return read_torch(older)
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)


def read_torch(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """Read tensors that ``torch.save`` wrote: as data, no pickle is run, and no more than the file has bytes.

    Args:
        path: The file.
        key: Under which entry of what it holds the tensors are, if it holds more.

    Raises:
        PEFTError: It is damaged, or holds anything else.
    """
    _require_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        zipfile.BadZipFile,
        pickle.UnpicklingError,
        RuntimeError,
        ValueError,
        OSError,
        EOFError,
        *BROKEN_PICKLE,
    ) as error:
        # torch's own words tell the reader to run what is in the file.
        unpickled = isinstance(error, pickle.UnpicklingError)
        reason = "it holds more than data" if unpickled else str(error).partition("\n")[0]
        if named := _GLOBAL.search(str(error)):
            reason = f"it holds {named[1]}, which is no tensor"
        raise PEFTError(f"{path} cannot be read as tensors: {reason}. Take a copy with safetensors.") from error
    content = content.get(key) if key is not None and isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise PEFTError(f"{path} holds other things than tensors by name. Take a copy with safetensors.")
    return {str(name): tensor for name, tensor in content.items()}


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file to read tensors one by one.

    What fails of what is done with them, such as writing to a full disk, is not the file's fault and raised as it is.

    Raises:
        PEFTError: The file is missing or damaged.
    """
    _require_file(path)
    refuse_unreadable_name(path)
    try:
        opened = safe_open(path, framework="pt")
    except (SafetensorError, OSError, RuntimeError) as error:
        raise _damaged(path, error) from error
    try:
        with opened as file:
            yield file
    except SafetensorError as error:
        raise _damaged(path, error) from error
    except RuntimeError as error:
        if path.is_file():
            raise
        raise _damaged(path, error) from error


def refuse_unreadable_name(path: Path) -> None:
    """Check that safetensors can read a file at ``path``: it writes under any name, and reads UTF-8 alone.

    Raises:
        PEFTError: It cannot.
    """
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError as error:
        raise PEFTError(
            f"{str(path)!r} is not UTF-8, and safetensors reads no file in such a place. Rename the folder."
        ) from error


def _damaged(path: Path, error: Exception) -> PEFTError:
    return PEFTError(f"{path} is damaged or truncated: {error}. Take another copy.")


def inside(directory: Path, name: str) -> Path:
    """Return the path of the file that ``directory`` itself names so.

    Raises:
        PEFTError: It lies outside of ``directory``.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise PEFTError(f"{directory} names the file {name!r}, which lies outside of it. It is not read.")
    return directory / name


def as_path(path: str | os.PathLike[str]) -> Path:
    """Return ``path``, which need not exist, as one that the system can look for.

    Raises:
        PEFTError: It cannot: a name is too long, or has characters that no name has.
    """
    try:
        os.stat(path)
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) or error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            reason = getattr(error, "strerror", None) or error
            raise PEFTError(
                f"There can be nothing at {shown(os.fspath(path))}: {reason}. Give another path."
            ) from error
    return Path(path)


def _require_file(path: Path) -> None:
    as_path(path)
    if not path.is_file():
        model = (
            " That is a whole model: load it with from_pretrained." if (path.parent / "config.json").is_file() else ""
        )
        raise PEFTError(
            f"{path} does not exist. An adapter is a directory with adapter_config.json and adapter_model.safetensors."
            f"{model}"
        )
    if path.is_symlink():
        real, directory = path.resolve(), path.parent.resolve()
        # The hub's cache keeps files beside the snapshots that they are linked in.
        if not (real.is_relative_to(directory) or real.parent == directory.parent.parent / "blobs"):
            raise PEFTError(f"{path} is a link to {real}, which lies outside of its directory. It is not read.")
