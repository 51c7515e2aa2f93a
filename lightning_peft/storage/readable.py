"""What can be read back: checkpoints that are whole, and of tensors and plain values, so that no pickle is run."""

from __future__ import annotations

import errno
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import save  # not by way of torch, where others put functions that count, send or write elsewhere

from lightning_peft.errors import PEFTError
from lightning_peft.files.contents import BROKEN_PICKLE, read_shapes
from lightning_peft.files.manifest import check_manifest
from lightning_peft.files.remote import is_file, opened
from lightning_peft.formats.deepspeed import is_deepspeed
from lightning_peft.formats.distributed import is_sharded
from lightning_peft.tensors.sharding import map_tensors

TRAINER_STATE = "trainer_state.ckpt"
"""What an adapter directory holds for going on with a run."""


def is_whole(path: Path) -> bool:
    """Whether the checkpoint ``path``, a file or a directory, is there and not damaged; nothing is unpickled."""
    try:
        if not path.is_dir():
            return _is_whole_file(path)
        check_manifest(path)
        if not (path / TRAINER_STATE).is_file():
            # Other layouts are moved to their place when they are whole.
            return is_sharded(path) or is_deepspeed(path)
        for file in path.rglob("*.safetensors"):
            read_shapes(file)
        return _is_whole_file(path / TRAINER_STATE)
    except PEFTError:
        return False


def _is_whole_file(path: Path) -> bool:
    try:
        with opened(path) as file:
            return zipfile.is_zipfile(file) and _damaged_record(file) is None
    except OSError:
        return False


def check_sums(path: str | os.PathLike[str]) -> None:
    """Check a file of ``torch.save`` against the checksums in it, which ``torch.load`` does not do.

    Raises:
        PEFTError: It is not what was written.
    """
    if not is_file(path):
        return
    with opened(path) as file:
        record = _damaged_record(file) if zipfile.is_zipfile(file) else None
    if record:
        raise PEFTError(f"{path} is damaged: {record} is not what was written. Take another one.")


def _damaged_record(file: BinaryIO) -> str | None:
    """Return the name of a record of a zip file that is not as its checksum says."""
    try:
        with zipfile.ZipFile(file) as content:
            if any(record.compress_type != zipfile.ZIP_STORED for record in content.infolist()):
                return "a record is compressed, which torch.save never does, so it"
            # torch writes zeros where it was told to compute none.
            return content.testzip() if any(record.CRC for record in content.infolist()) else None
    except (zipfile.BadZipFile, ValueError, RuntimeError, EOFError, struct.error) as error:
        return str(error) or "a record"
    except OSError as error:
        if error.errno != errno.EINVAL:  # which a record before the beginning makes
            raise
        return "a record's place"


def objects(checkpoint: Mapping[str, Any]) -> dict[str, str]:
    """Return where ``checkpoint`` holds something else, and what: it is read with ``weights_only=False`` alone.

    Raises:
        PEFTError: Something in it cannot be written at all.
    """
    # Tensors are plain, and large.
    return dict(_objects(map_tensors(dict(checkpoint), lambda _: torch.empty(0)), "checkpoint"))


def _objects(value: Any, where: str) -> Iterator[tuple[str, str]]:
    names = _asked_for(value, where)
    inside: list[tuple[str, str]] = []
    if names and isinstance(value, Mapping):
        inside = [found for key, inner in value.items() for found in _objects(inner, f"{where}[{key!r}]")]
    yield from inside or ([(where, ", ".join(names))] if names else [])


def _asked_for(value: Any, where: str) -> list[str]:
    """Return the names of the classes and functions that unpickling ``value`` would call."""
    buffer = io.BytesIO()
    try:
        save(value, buffer)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise PEFTError(
            f"{where} cannot be written to a checkpoint: {error}. Take it out, in on_save_checkpoint or with "
            "save_hyperparameters(ignore=[...])."
        ) from error
    buffer.seek(0)
    return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(buffer))


@contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what ``torch.load`` raises into an error that says whether the file ``path`` is damaged.

    Raises:
        PEFTError: It is, or it holds more than tensors and plain values.
    """
    try:
        yield
    except PEFTError:
        raise
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, *BROKEN_PICKLE) as error:
        if not is_file(path) or (isinstance(error, BROKEN_PICKLE) and _names_in(path)):
            raise
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which a file that is cut off makes
            raise PEFTError(f"Cannot read {path}: {error.strerror or error}. Check its permissions.") from error
        if names := _names_in(path):
            raise PEFTError(
                f"{path} holds more than tensors and plain values: {', '.join(names)}. The file is whole, but that is "
                "not unpickled unless you pass weights_only=False; do so only if you trust whoever wrote it. It may "
                "come from save_hyperparameters(), which takes ignore=[...], or from a callback's state."
            ) from error
        raise PEFTError(f"{path} is damaged or truncated, or no checkpoint. Take another one.") from error


def _names_in(path: str | os.PathLike[str]) -> list[str]:
    try:
        with opened(path) as file:
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, *BROKEN_PICKLE):
        return []
