"""Writing so that whatever happens leaves the old or the new one whole: directories, files, links.

What is written lies beside its place, synced, until it is whole, and is then moved there: a full disk is noticed before
the old one is touched.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from lightning_peft.errors import PEFTError
from lightning_peft.files.contents import MARKER, as_path
from lightning_peft.files.leftovers import (
    ASIDE,
    STAGING,
    beside,
    clean,
    discard,
    open_any,
    restore_interrupted,
    staging,
)

SHARDED = "meta.pt"
"""The file that makes a directory a sharded checkpoint of Lightning's."""

_IN_THE_WAY = {errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.EEXIST}
_TRIES = 100


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary sibling to write into; on success it takes the place of ``path``, on failure it goes.

    Raises:
        PEFTError: ``path`` exists and is not a directory written by this package, or cannot be written to.
    """
    with _place(path) as target:
        clean(target.parent, target.name)
        _refuse_foreign(target)
        with staging(target, Path.mkdir) as directory:
            yield directory
            for file in [*directory.rglob("*"), directory]:
                _fsync(file)
            _move(directory, target)


def require_space(directory: Path, size: int) -> None:
    """Check that ``size`` bytes have room where ``directory`` is, before the work of making them.

    Raises:
        PEFTError: They have not.
    """
    free = shutil.disk_usage(directory).free
    if free < size:
        raise PEFTError(
            f"{directory.parent} has room for {free / 1e9:,.2f} GB; {size / 1e9:,.2f} GB are to be written. Make room, "
            "or choose another disk."
        )


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Yield a file to write to; on success it takes the place of ``path``, on failure it goes.

    Raises:
        PEFTError: ``path`` is a directory that was not written by this package, or cannot be written to.
    """
    with _place(path) as target:
        if target.is_dir():
            _refuse_foreign(target)
        with staging(target, Path.touch) as place:
            with place.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            _move(place, target)


def replace_link(source: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Make ``path`` a link to ``source``, whatever of this package's is there now.

    Raises:
        PEFTError: ``path`` is a directory that was not written by this package, or cannot be written to.
    """
    with _place(path) as target:
        if target.is_dir() and not target.is_symlink():
            _refuse_foreign(target)
        with staging(target, Path.mkdir) as directory:
            os.symlink(os.path.relpath(source, target.parent), directory / target.name)
            _move(directory / target.name, target)


def remove(path: str | os.PathLike[str]) -> None:
    """Remove a file, a link or a directory, if it is there: at no moment there is half of it.

    Raises:
        PEFTError: It cannot be removed.
    """
    target = Path(os.path.abspath(path))
    aside = beside(target, STAGING)
    with os_errors("remove", target), suppress(FileNotFoundError):
        os.rename(target, aside)
        discard(aside)


@contextmanager
def os_errors(action: str, target: Path) -> Iterator[None]:
    """Turn errors of the operating system, as the libraries that write files pass them on, into one of ours.

    Raises:
        PEFTError: There was one.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if (reason := _reason(error)) is None:
            raise
        raise PEFTError(
            f"Cannot {action} {target}: {reason}. There is no half of it. Check the path, its permissions and the free "
            "space."
        ) from error


def _reason(error: BaseException | None) -> str | None:
    if isinstance(error, SafetensorError):
        return str(error)
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__  # torch.save raises another error on top of it
    return None if error is None else error.strerror or str(error)


@contextmanager
def _place(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the absolute path, in a folder that exists."""
    target = Path(os.path.abspath(as_path(path)))
    with os_errors("write", target):
        target.parent.mkdir(parents=True, exist_ok=True)
        yield target


def _refuse_foreign(target: Path) -> None:
    try:
        names = os.listdir(target)  # once: another process may be about to replace it
    except FileNotFoundError:
        return
    except NotADirectoryError:
        names = [target.name]
    if names and not {MARKER, SHARDED} & set(names):
        raise PEFTError(
            f"{target} exists and was not written by lightning_peft: it is not overwritten. Choose another path, or "
            "remove it."
        )


def _move(place: Path, target: Path) -> None:
    """Put what was written at ``place`` in the place of ``target``.

    No portable call exchanges two directories: the old one steps aside for the moment between two renames, and
    ``restore_interrupted`` brings it back after a crash in that moment. Another process may do the same.
    """
    asides: list[Path] = []
    try:
        for _ in range(_TRIES):
            try:
                os.replace(place, target)
                break
            except OSError as error:
                if error.errno not in _IN_THE_WAY:
                    raise
            asides.append(beside(target, ASIDE))
            with suppress(FileNotFoundError):
                os.rename(target, asides[-1])
        else:
            raise PEFTError(f"Cannot write {target}: other processes write there all the time. Choose another path.")
    except BaseException:
        restore_interrupted(target)
        raise
    _fsync(target.parent)
    for aside in asides:
        discard(aside)


def _fsync(path: Path) -> None:
    # Without it a power cut may leave renamed but empty files.
    if (descriptor := open_any(path)) is not None:
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
