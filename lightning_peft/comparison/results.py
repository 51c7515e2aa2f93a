"""The files of a run: what it is asked to do, and what came of it, each there as a whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from lightning_peft.comparison.cells import Run, placed
from lightning_peft.comparison.origins import origin
from lightning_peft.errors import PEFTError
from lightning_peft.files.writing import atomic_file, remove

CONFIG, REQUEST, RESULT, FAILURE, LOG = "config.yaml", "request.json", "result.json", "failure.json", "log.txt"
_ORIGINS = "origins.json"
TRAINED = "trained"
"""The adapter that a run has trained."""
_LOCK = ".lock"


def ask(run: Run, stages: Sequence[str], keep: bool, probe: Path | None) -> None:
    """Write what a run's process reads: its config, and what is to be measured.

    Args:
        run: The run.
        stages: What its result is to hold: ``validate``, ``test``, ``latency``.
        keep: Whether the trained adapter stays when all of it is there.
        probe: Where the names of what a module logs are to be written before it is trained, if nobody knows them yet.
    """
    with atomic_file(run.directory / CONFIG) as file:
        file.write(yaml.safe_dump(placed(run), sort_keys=False).encode())
    request = {
        "name": run.name,
        "fingerprint": run.fingerprint,
        "stages": list(stages),
        "keep": keep,
        "probe": None if probe is None else str(probe),
    }
    write_json(run.directory / REQUEST, request)


def result_of(run: Run) -> dict[str, Any] | None:
    """Return what a run has written, if it is of this run's config."""
    found = read_json(run.directory / RESULT)
    return found if found is not None and found.get("fingerprint") == run.fingerprint else None


def note_origin(directory: Path) -> list[dict[str, str]]:
    """Note what the run in a directory is made from as it begins, or goes on, and return all that was noted of it."""
    config = yaml.safe_load((directory / CONFIG).read_text())
    found: list[dict[str, str]] = (read_json(directory / _ORIGINS) or {}).get("origins", [])
    if (present := origin(config)) not in found:
        write_json(directory / _ORIGINS, {"origins": [*found, present]})
        return [*found, present]
    return found


def failure_of(run: Run) -> str | None:
    """Return in one line why a run has failed, if it has."""
    found = read_json(run.directory / FAILURE)
    return None if found is None else str(found.get("reason"))


def fail(directory: Path, reason: str) -> None:
    """Write why a run has failed."""
    write_json(directory / FAILURE, {"reason": " ".join(reason.split())[:500]})


def has_failed(directory: Path) -> bool:
    """Whether a run has written why it failed."""
    return (directory / FAILURE).exists()


def forget_failure(directory: Path) -> None:
    """Remove what an earlier attempt has said."""
    if has_failed(directory):
        remove(directory / FAILURE)


def is_finished(result: Mapping[str, Any] | None, stages: Sequence[str]) -> bool:
    """Whether a result holds all that is asked for, or its run has diverged and there is no more to come."""
    return result is not None and (bool(result.get("diverged")) or all(stage in result for stage in stages))


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file."""
    with atomic_file(path) as file:
        file.write(json.dumps(content, indent=1).encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file; nothing if there is no such file, or another one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


@contextmanager
def locked(directory: Path, wait: bool = True) -> Iterator[None]:
    """Be the only process at work in a directory: a run that outlived its comparison is waited for.

    Raises:
        PEFTError: Another process is, and is not to be waited for.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise PEFTError(
                f"Another comparison is at work in {directory}. Wait for its end, or choose another --out."
            ) from error
        yield
    finally:
        os.close(descriptor)
