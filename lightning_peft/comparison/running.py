"""Runs side by side, until nothing is left to do, told of line by line."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_peft.comparison.cells import Cell, Run
from lightning_peft.comparison.choosing import State, count, due, left_over, no_metric
from lightning_peft.comparison.grid import STAGES, Grid
from lightning_peft.comparison.machine import LOCAL, SLURM, Machine, has_ended
from lightning_peft.comparison.results import (
    LOG,
    TRAINED,
    ask,
    fail,
    failure_of,
    forget_failure,
    is_finished,
    read_json,
    result_of,
)
from lightning_peft.errors import PEFTError

_LOGGED = "logged.json"
_PAUSE = {LOCAL: 0.2, SLURM: 1.0}
"""Seconds between two looks at what is at work."""


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
        self._probed: str | None = None

    def run(self) -> None:
        """Do all runs of which there is no result yet.

        Raises:
            PEFTError: A metric is named that the first run does not log. What was at work is cancelled.
        """
        if done := self._finished():
            self.tell(f"[{done}/{count(self.grid, self.cells)}] are there already")
        try:
            while self._step():
                time.sleep(_PAUSE[self.machine.cluster])
        finally:
            for job in self._running:
                self.machine.end(job.handle)

    def _finished(self) -> int:
        return sum(is_finished(self._result(run), stages) for run, stages in due(self.grid, self.cells, self.state))

    def _step(self) -> bool:
        """Look after jobs that have ended and start others; return whether there is anything left."""
        for job in list(self._running):
            if over := has_ended(job.handle):
                self._running.remove(job)
            for work in list(job.work):
                if over or is_finished(self._result(work[0]), work[1]):
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
            if self._probed is None:
                self._probed, probe = run.fingerprint, self.grid.out.absolute() / _LOGGED
            ask(run, stages, self.grid.keep_adapters and len(stages) > 1, probe)
            forget_failure(run.directory)
        self._running.append(_Job(self.machine.submit([run.directory for run, _ in work], slot), slot, work))

    def _account(self, run: Run, stages: tuple[str, ...], job: _Job) -> None:
        """Tell what became of a run that has ended."""
        self._results.pop(run.directory, None)  # it may be that of the candidate, of which there is more now
        result = self._result(run)
        if is_finished(result, stages):
            verb = "diverged" if result and result.get("diverged") else "done"
            if lacks := self._lacks(stages, result or {}):
                verb += f", but {lacks}"
        else:
            if failure_of(run) is None:
                fail(run.directory, f"its job ended ({str(job.handle.state).lower()}) before it did")
            verb = f"FAILED ({failure_of(run)}; log: {run.directory / LOG})"
        for other in left_over(self.grid, run.cell, self.state):
            shutil.rmtree(other.directory / TRAINED, ignore_errors=True)
        done, total = self._finished(), count(self.grid, self.cells)
        seconds = time.monotonic() - self._began
        self.tell(f"[{done}/{total}] {run.name}: {verb} ({len(self._running)} jobs at work, {seconds:.0f} s)")

    def _check_names(self) -> None:
        """Look at the names that the first run's module logs, as soon as they are known."""
        if self._names is not None or self._probed is None:
            return
        found = read_json(self.grid.out.absolute() / _LOGGED)
        if found is None or found.get("fingerprint") != self._probed:
            return
        self._names = found
        for stage in STAGES:
            for name in self._named(stage):
                if (logged := found.get(stage)) and name not in logged:
                    raise PEFTError(f"{self.grid.source}: The first run: {no_metric(name, stage, logged)}")

    def _lacks(self, stages: tuple[str, ...], result: Mapping[str, Any]) -> str:
        """Return what a run was to log and has not: a fault of its own, since the first run has."""
        return "; ".join(
            no_metric(name, stage, result[stage])
            for stage in STAGES
            if stage in stages and stage in result
            for name in self._named(stage)
            if name not in result[stage]
        )

    def _named(self, stage: str) -> list[str]:
        """Return the names of what a stage is to log."""
        choice = self.grid.choice
        return [*([choice.metric] if choice and stage == "validate" else []), *self.grid.report.get(stage, ())]

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
