"""Where runs run: as jobs of submitit, on the devices of this machine or on a SLURM cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_peft.errors import PEFTError

LOCAL, SLURM = "local", "slurm"
# Asked in torch's default way whether there is CUDA, as imports do, a process could not have forks that use it.
_ASKED = ["env", "PYTORCH_NVML_BASED_CUDA_CHECK=1"] if sys.platform == "linux" else []
_COMMAND = [*_ASKED, sys.executable, "-m", "lightning_peft.cli.cells"]
_JOBS = "jobs"
"""Under it, in the directory of results, submitit keeps its files."""
_A_YEAR = 60 * 24 * 365
_PATIENCE = 100
"""Tenths of a second in which a run may save before nobody waits for it."""


def require_submitit() -> None:
    """Raise :class:`PEFTError` if submitit is not installed."""
    if find_spec("submitit") is None:
        raise PEFTError("Comparisons need submitit: pip install 'lightning_peft[compare]'.")


@dataclass
class Machine:
    """Where runs run, and how many at a time."""

    cluster: str
    jobs: int | None
    """Jobs at a time; by default one a device on this machine, all on a cluster."""
    per_job: int
    """Runs that a job does one after another."""
    folder: Path
    parameters: Mapping[str, Any]
    devices: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.devices = _devices() if self.cluster == LOCAL else []
        if self.jobs is None and self.cluster == LOCAL:
            self.jobs = max(1, len(self.devices))
        if (self.jobs is not None and self.jobs < 1) or self.per_job < 1:
            raise PEFTError(f"jobs={self.jobs} and per_job={self.per_job} were given; both are 1 or more.")
        self._executor = self._make()

    def _make(self) -> Any:
        require_submitit()
        import submitit

        parameters = {"timeout_min": _A_YEAR} if self.cluster == LOCAL else dict(self.parameters)
        try:
            executor = submitit.AutoExecutor(folder=self.folder / _JOBS, cluster=self.cluster)
            executor.update_parameters(name="compare", **parameters)
        except (RuntimeError, NameError, ValueError, AssertionError) as error:
            raise PEFTError(f"submitit cannot start jobs by {self.cluster}: {error}") from error
        return executor

    def submit(self, directories: Sequence[Path], slot: int) -> Any:
        """Start a job that does the runs in these directories; on this machine on the device of a slot."""
        import submitit

        environment = None
        if self.cluster == LOCAL:
            environment = dict(os.environ)
            if self.devices:
                environment["CUDA_VISIBLE_DEVICES"] = self.devices[slot % len(self.devices)]
        command = submitit.helpers.CommandFunction([*_COMMAND, *map(str, directories)], env=environment)
        # Ctrl-C in a terminal reaches all processes. Jobs are ended in another way, which lets them save first.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if _in_main_thread() else None
        try:
            return self._executor.submit(command)
        finally:
            if handler is not None:
                signal.signal(signal.SIGINT, handler)

    def end(self, job: Any) -> None:
        """End a job before its time; on this machine wait a little until its run has saved where it is."""
        if self.cluster != LOCAL:
            job.cancel(check=False)
            return
        controller = int(job.job_id)
        told: set[int] = set()
        for _ in range(_PATIENCE):
            if job.done():
                return
            if not (processes := _descendants(controller)):
                break
            for process in set(processes) - told:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGTERM)
            told.update(processes)
            time.sleep(0.1)
        with suppress(ProcessLookupError):
            os.kill(controller, signal.SIGKILL)


@contextmanager
def interruptible() -> Iterator[None]:
    """Have SIGTERM, and the end of the terminal, interrupt as Ctrl-C does: jobs would go on without their parent."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before: dict[int, Any] = {}
    try:
        for name in ("SIGTERM", "SIGHUP") if _in_main_thread() else ():
            # Under nohup the end of the terminal is to change nothing.
            if (number := getattr(signal, name, None)) and signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, interrupt)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _descendants(process: int) -> list[int]:
    """Return the processes that a process has started, and those that these have, as far as the system tells."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(status.parent.name))
    found = list(children.get(process, ()))
    for child in found:
        found += children.get(child, ())
    return found


def _devices() -> list[str]:
    """Return the CUDA devices that this process sees, as ``CUDA_VISIBLE_DEVICES`` names them."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    return [str(number) for number in range(torch.cuda.device_count())]


def has_ended(job: Any) -> bool:
    """Whether a job of submitit has ended, in whatever way."""
    if job.done():
        return True
    # A cluster without accounting knows nothing of jobs that have died.
    if job.state == "UNKNOWN":
        listed = subprocess.run(["squeue", "--noheader", "--jobs", job.job_id], capture_output=True, text=True)
        return listed.returncode != 0 or not listed.stdout.strip()
    return False
