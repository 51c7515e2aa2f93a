"""Runs side by side: as jobs of submitit, on the devices of this machine or on a SLURM cluster."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_peft.comparison.cells import Cell, Run
from lightning_peft.comparison.choosing import State, count, due, no_metric
from lightning_peft.comparison.grid import STAGES, Grid
from lightning_peft.comparison.results import (
    ask,
    fail,
    failure_of,
    forget_failure,
    is_finished,
    read_json,
    result_of,
)
from lightning_peft.errors import PEFTError

LOCAL, SLURM = "local", "slurm"
_COMMAND = [sys.executable, "-m", "lightning_peft.cli.cells"]
_JOBS = "jobs"
"""Under it, in the directory of results, submitit keeps its files."""
_LOGGED = "logged.json"
_A_YEAR = 60 * 24 * 365
_PAUSE = {LOCAL: 0.1, SLURM: 1.0}


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
        return self._executor.submit(command)


def _devices() -> list[str]:
    """Return the CUDA devices that this process sees, as ``CUDA_VISIBLE_DEVICES`` names them."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    return [str(number) for number in range(torch.cuda.device_count())]


@dataclass
class _Job:
    handle: Any
    slot: int
    work: list[tuple[Run, tuple[str, ...]]]


class Comparison:
    """Does what is due until nothing is, and tells of it line by line."""

    def __init__(self, grid: Grid, cells: list[Cell], machine: Machine, tell: Callable[[str], None]) -> None:
        self.grid, self.cells, self.machine, self.tell = grid, cells, machine, tell
        self._results: dict[Path, dict[str, Any]] = {}
        self._tried: set[tuple[Path, tuple[str, ...]]] = set()
        self._running: list[_Job] = []
        self._began = time.monotonic()
        self.state = State(self._result, self._failure)
        self._names: dict[str, Any] | None = None

    def run(self) -> None:
        """Do all runs of which there is no result yet.

        Raises:
            PEFTError: A metric is named that runs do not log. What was at work is cancelled.
        """
        try:
            while self._step():
                time.sleep(_PAUSE[self.machine.cluster])
        except BaseException:
            for job in self._running:
                with suppress(Exception):
                    job.handle.cancel(check=False)
            raise

    def _step(self) -> bool:
        """Look after jobs that have ended and start others; return whether there is anything left."""
        for job in list(self._running):
            has_ended = _has_ended(job.handle)
            if has_ended:
                self._running.remove(job)
            for work in list(job.work):
                if has_ended or is_finished(self._result(work[0]), work[1]):
                    job.work.remove(work)
                    self._account(*work, job)
        self._check_names()
        waiting = [work for work in due(self.grid, self.cells, self.state) if self._is_open(*work)]
        for slot in self._free_slots(len(waiting)):
            if not waiting:
                break
            share = min(self.machine.per_job, -(-len(waiting) // max(1, (self.machine.jobs or 1))))
            self._start(waiting[: max(1, share)], slot)
            waiting = waiting[max(1, share) :]
        return bool(self._running)

    def _is_open(self, run: Run, stages: tuple[str, ...]) -> bool:
        return (run.directory, stages) not in self._tried and not is_finished(self._result(run), stages)

    def _free_slots(self, waiting: int) -> Iterator[int]:
        taken = {job.slot for job in self._running}
        total = self.machine.jobs if self.machine.jobs is not None else len(self._running) + waiting
        yield from (slot for slot in range(total) if slot not in taken)

    def _start(self, work: list[tuple[Run, tuple[str, ...]]], slot: int) -> None:
        for run, stages in work:
            self._tried.add((run.directory, stages))
            probe = None
            if self._names is None and not self._running and run is work[0][0]:
                probe = self.grid.out.absolute() / _LOGGED
            ask(run, stages, self.grid.keep_adapters and len(stages) > 1, probe)
            forget_failure(run.directory)
        self._running.append(_Job(self.machine.submit([run.directory for run, _ in work], slot), slot, work))

    def _account(self, run: Run, stages: tuple[str, ...], job: _Job) -> None:
        """Tell what became of a run whose job has ended."""
        result = self._result(run)
        if is_finished(result, stages):
            verb = "diverged" if result and result.get("diverged") else "done"
            self._check_result(run, stages, result or {})
        else:
            if failure_of(run) is None:
                fail(run.directory, f"its job ended ({_state(job.handle)}) before it did")
            verb = f"FAILED ({failure_of(run)}; log: {run.directory / 'log.txt'})"
        total = count(self.grid, self.cells)
        finished = len(self._results)
        running = sum(len(other.work) for other in self._running)
        seconds = time.monotonic() - self._began
        self.tell(f"[{finished}/{total}] {run.name}: {verb} ({running} running, {seconds:.0f} s)")

    def _check_names(self) -> None:
        """Look at the names that the first run's module logs, as soon as they are known."""
        if self._names is not None or not self._tried:
            return
        path = self.grid.out.absolute() / _LOGGED
        self._names = read_json(path)
        for stage in STAGES if self._names else ():
            if logged := (self._names or {}).get(stage):
                self._require(stage, logged, "The first run")

    def _check_result(self, run: Run, stages: tuple[str, ...], result: Mapping[str, Any]) -> None:
        for stage in STAGES:
            if stage in stages and stage in result:
                self._require(stage, result[stage], run.name)

    def _require(self, stage: str, logged: Mapping[str, Any], where: str) -> None:
        choice = self.grid.choice
        chosen_by = [choice.metric] if choice and stage == "validate" else []
        for name in (*chosen_by, *self.grid.report.get(stage, ())):
            if name not in logged:
                raise PEFTError(f"{self.grid.source}: {no_metric(name, stage, logged, where)}")

    def _result(self, run: Run) -> dict[str, Any] | None:
        if run.directory not in self._results or self._is_running(run):
            found = result_of(run)
            if found is None:
                return None
            self._results[run.directory] = found
        return self._results[run.directory]

    def _is_running(self, run: Run) -> bool:
        return any(run.directory == other.directory for job in self._running for other, _ in job.work)

    def _failure(self, run: Run) -> str | None:
        tried = any(directory == run.directory for directory, _ in self._tried)
        return failure_of(run) if tried and not self._is_running(run) else None


def _has_ended(job: Any) -> bool:
    if job.done():
        return True
    # A cluster without accounting knows nothing of jobs that have died.
    if job.state == "UNKNOWN":
        listed = subprocess.run(["squeue", "--noheader", "--jobs", job.job_id], capture_output=True, text=True)
        return listed.returncode != 0 or not listed.stdout.strip()
    return False


def _state(job: Any) -> str:
    return str(job.state).lower()
