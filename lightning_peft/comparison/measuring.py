"""What is measured of a run beside its metrics: time and memory of steps, bytes to keep, latency."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from contextvars import copy_context
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_peft.callbacks.summary import adapter_summary
from lightning_peft.core.contexts import disable, evaluating
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.operations.merge import merge, unmerge
from lightning_peft.storage.readable import TRAINER_STATE

_KEPT = 1000
"""Of so many steps, the last ones, durations are remembered."""
_ROUNDS = 3
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class StepMeter(pl.Callback):
    """Measures training steps, from the batch to the optimizer's end, without what loads data and validates.

    What it has measured is in checkpoints, so that a run that was resumed tells of all its steps.
    """

    def __init__(self) -> None:
        self.durations: deque[float] = deque(maxlen=_KEPT)
        self.peak = 0
        self.trained = 0
        self._began = self._open = 0.0
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count what is trained; forget the memory that loading took."""
        self.trained = adapter_summary(pl_module).trained
        self._step = trainer.global_step
        _reset_peak(pl_module.device)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Begin to measure."""
        self._began = _now(pl_module.device)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Add up the batches of a step."""
        self._open += _now(pl_module.device) - self._began
        if trainer.global_step != self._step:
            self.durations.append(self._open)
            self._open, self._step = 0.0, trainer.global_step
        self.peak = max(self.peak, _peak(pl_module.device))

    def state_dict(self) -> dict[str, Any]:
        """Return what has been measured."""
        return {"durations": list(self.durations), "peak": self.peak}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what had been measured."""
        self.durations.extend(state_dict["durations"])
        self.peak = state_dict["peak"]

    def measured(self) -> dict[str, Any]:
        """Return trained parameters, seconds of a step (median) and peak memory in bytes."""
        seconds = median(self.durations) if self.durations else None
        return {"trained_parameters": self.trained, "seconds_per_step": seconds, "peak_memory": self.peak}


def bytes_of(directory: Path) -> int:
    """Return the size of an adapter's files: of a checkpoint without what resumes training."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file() and file.name != TRAINER_STATE)


class FirstCall:
    """Remembers what a module is first called with: the outermost part of it that holds something trained."""

    def __init__(self) -> None:
        self.of: tuple[nn.Module, tuple[Any, ...], dict[str, Any]] | None = None
        self._context = copy_context()

    @contextmanager
    def watching(self, module: nn.Module) -> Iterator[None]:
        """Within it, look out for the first call. Hooks go at once, so that nothing else is called through them."""
        handles: list[Any] = []

        def remember(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.of is None:
                self.of, self._context = (part, args, kwargs), copy_context()
            while handles:
                handles.pop().remove()

        parts = [part for part in module.modules() if any(p.requires_grad for p in part.parameters())]
        # Before what adapters do there, which may call parts of their own.
        handles += [part.register_forward_pre_hook(remember, with_kwargs=True, prepend=True) for part in parts]
        try:
            yield
        finally:
            while handles:
                handles.pop().remove()

    def again(self) -> None:
        """Call it once more, with what its context had said to it, such as where answers begin."""
        assert self.of is not None
        part, args, kwargs = self.of
        now = copy_context()
        now.run(lambda: [variable.set(value) for variable, value in self._context.items() if variable not in now])
        now.run(part, *args, **kwargs)


def latencies(trainer: pl.Trainer, module: pl.LightningModule, first: FirstCall) -> dict[str, Any]:
    """Return how long a forward pass takes, merged if the adapters merge, and the base model's, by turns.

    Args:
        trainer: Whose precision holds.
        module: With its adapters attached.
        first: What is called: a batch of an evaluation.

    Returns:
        ``seconds`` and ``base_seconds`` (medians; None where nothing can be measured: on several processes), and
        ``merges``.
    """
    if first.of is None or trainer.world_size > 1:
        return {"seconds": None, "base_seconds": None, "merges": None}

    def call() -> None:
        with torch.inference_mode(), trainer.precision_plugin.forward_context():
            first.again()

    merges, adapted = _merges(module), bool(ModelView(module).slots)
    ours, base = [], []
    with evaluating(module):
        for _ in range(_ROUNDS):
            with _merged(module) if merges and adapted else nullcontext():
                ours.append(_timed(call, module.device))
            with disable(module) if adapted else nullcontext():
                base.append(_timed(call, module.device))
    return {"seconds": median(ours), "base_seconds": median(base), "merges": merges}


def _merges(module: nn.Module) -> bool:
    """Whether every adapter can be merged."""
    try:
        report = merge(module)
    except PEFTError:
        return False
    unmerge(module)
    return not report.kept


@contextmanager
def _merged(module: nn.Module) -> Iterator[None]:
    merge(module)
    try:
        yield
    finally:
        unmerge(module)


def _timed(call: Callable[[], None], device: torch.device) -> float:
    """Return the median time of a call, of as many as take a second, at most ten; the first is not counted."""
    began = _now(device)
    call()
    first = _now(device) - began
    found = []
    for _ in range(max(1, min(10, int(1 / max(first, 1e-3))))):
        began = _now(device)
        call()
        found.append(_now(device) - began)
    return median(found)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # elsewhere than on Linux the peak is that of the whole process
            _RESET.write_text("5")


def _peak(device: torch.device) -> int:
    """Return the peak since the last reset: of allocations on a GPU, elsewhere of the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return 0
