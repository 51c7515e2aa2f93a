"""What lies beside its place while it is written, and stays there if the process is killed.

It is told by its name, and what a process still writes by a lock that dies with the process. So is a folder that a run
writes to.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from lightning_peft.files.contents import MARKER

try:
    import fcntl
except ImportError:  # Windows, where nothing that was left is taken for abandoned
    fcntl = None  # type: ignore[assignment]

STAGING, ASIDE = ".tmp", ".old"
_CLAIM = ".lightning_peft.lock"
_TRIES = 100
_LEFT = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}(?P<suffix>\.tmp|\.old)")
_LEFT_BY_0_1 = re.compile(r"\.(?P<name>.+)(?P<suffix>\.old)")


def beside(target: Path, suffix: str) -> Path:
    """Return a new name in the folder of ``target``, with the suffix for what is on its way there or from there."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}{suffix}")


def restore_interrupted(path: str | os.PathLike[str]) -> None:
    """Bring back what was at ``path`` if a crash came between moving it aside and putting the new one in its place."""
    target = Path(os.path.abspath(path))
    if os.path.lexists(target):
        return
    with suppress(OSError):
        asides = [left for left, name in _left(target.parent, ASIDE) if name == target.name]
        if asides:
            os.rename(max(asides, key=lambda left: left.lstat().st_mtime), target)


def clean(folder: Path, name: str | None = None) -> None:
    """Bring back what killed processes moved aside in ``folder``, and remove what else they left.

    Args:
        folder: Where to look.
        name: Of what was written, if not of everything.
    """
    with suppress(FileNotFoundError, NotADirectoryError):
        for aside, of in list(_left(folder, ASIDE)):
            if name in (None, of):
                restore_interrupted(folder / of)
                if os.path.lexists(folder / of):
                    discard(aside)
        for left, of in list(_left(folder, STAGING)):
            if name in (None, of):
                _discard_abandoned(left)


class Claim:
    """A folder that a run writes checkpoints to, which other runs can see; where files are not locked, they cannot.

    Raises:
        OSError: The folder cannot be written to.
    """

    other: str | None = None
    """What another run that has claimed the folder says of itself."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / _CLAIM
        for _ in range(_TRIES):
            self._descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o666)
            self._is_ours = lock(self._descriptor) is not False
            if not self._is_ours or self._is_there():
                break
            # The run that had the folder has removed the file before this one locked it.
            os.close(self._descriptor)
        if self._is_ours:
            os.truncate(self._descriptor, 0)
            since = datetime.now().astimezone().isoformat(" ", "seconds")
            os.write(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {since}".encode())
        else:
            self.other = os.read(self._descriptor, 200).decode(errors="replace")

    def _is_there(self) -> bool:
        """Whether what was locked is what others would lock."""
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self._file))
        return False

    def release(self) -> None:
        """Let other runs have the folder."""
        # Removed before it is unlocked: what another run locks afterwards is there, and stays.
        if self._is_ours:
            discard(self._file)
        os.close(self._descriptor)


def discard(path: Path) -> None:
    """Remove what is no longer, or was never, in its place; another process may do so too."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def staging(target: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """Yield what ``make`` makes beside ``target``, locked; what is still there afterwards goes."""
    path, descriptor = _made(target, make)
    try:
        yield path
    finally:
        if descriptor is not None:
            os.close(descriptor)
        if os.path.lexists(path):
            discard(path)


def _made(target: Path, make: Callable[[Path], None]) -> tuple[Path, int | None]:
    path = beside(target, STAGING)
    make(path)
    descriptor = None if fcntl is None else open_any(path)
    if fcntl is None or (descriptor is not None and lock(descriptor) is not False and path.exists()):
        return path, descriptor
    # Until it was locked, another process took it for abandoned.
    if descriptor is not None:
        os.close(descriptor)
    discard(path)
    return _made(target, make)


def lock(descriptor: int) -> bool | None:
    """Lock an open file until it is closed. Returns ``None`` where files are not locked, false if another has it."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def open_any(path: Path) -> int | None:
    """Open a file or a directory, if that is possible: Windows opens no directory."""
    try:
        return os.open(path, os.O_RDONLY)
    except (PermissionError, FileNotFoundError):
        return None


def _left(folder: Path, suffix: str) -> Iterator[tuple[Path, str]]:
    """Yield what lies in ``folder`` beside its place, with the name of that."""
    for entry in folder.iterdir():
        match = _LEFT.fullmatch(entry.name)
        if match is None and (entry / MARKER).is_file():
            match = _LEFT_BY_0_1.fullmatch(entry.name)
        if match is not None and match["suffix"] == suffix:
            yield entry, match["name"]


def _discard_abandoned(path: Path) -> None:
    """Remove ``path`` if no process writes it any more; not, if that cannot be told."""
    if path.is_symlink():
        discard(path)  # it was to be removed
    elif (descriptor := open_any(path)) is not None:
        try:
            if lock(descriptor):
                discard(path)
        finally:
            os.close(descriptor)
