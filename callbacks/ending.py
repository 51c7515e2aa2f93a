"""A run that is told to end, by SIGTERM or SIGUSR1, ends after its step and leaves a checkpoint of it.

Lightning ends a run so on SIGTERM, without a checkpoint. Nobody handles SIGUSR1, which clusters send before they take
a machine away, unless Lightning itself puts jobs of SLURM back. Both concern a run in one process: of several, some
would wait for others that have ended. There the last checkpoint is the one that was written last.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint


def listen() -> None:
    """Take SIGUSR1 for SIGTERM, if nobody else handles it; Lightning puts all handlers back when the run has ended."""
    usr1 = getattr(signal, "SIGUSR1", None)  # not on Windows
    if usr1 and threading.current_thread() is threading.main_thread() and signal.getsignal(usr1) is signal.SIG_DFL:
        signal.signal(usr1, _as_sigterm)


def save_last(trainer: pl.Trainer) -> None:
    """Have every ``ModelCheckpoint`` with ``save_last=True`` write its last checkpoint, if it has not for this step."""
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint) or callback.save_last is not True:
            continue
        if not callback._should_skip_saving_checkpoint(trainer):
            callback._save_last_checkpoint(trainer, callback._monitor_candidates(trainer))


def _as_sigterm(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
