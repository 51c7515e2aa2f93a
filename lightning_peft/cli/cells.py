"""The runs of a comparison: ``python -m lightning_peft.cli.cells DIRECTORY …``, each in a process of its own.

They are forks of this process, which has imported all that they need. What a run is to do stands in its directory, as
does then what came of it.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_peft.cli.command_line import PEFTCLI
from lightning_peft.comparison.cells import CHECKPOINTS
from lightning_peft.comparison.measuring import FirstCall, StepMeter, bytes_of, latencies
from lightning_peft.comparison.results import (
    CONFIG,
    LOG,
    REQUEST,
    RESULT,
    TRAINED,
    fail,
    forget_failure,
    has_failed,
    is_finished,
    locked,
    note_origin,
    read_json,
    write_json,
)
from lightning_peft.errors import PEFTError
from lightning_peft.storage.checkpoint_directory import AdapterDirectory

HERE = "--here"
"""Before a directory: do its run in this process. So does what Lightning starts for further ranks."""


class _Command(PEFTCLI):
    """A command of a run, with the meter."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        self.meter = StepMeter()
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks.append(self.meter)  # type: ignore[attr-defined]
        return trainer


def main(arguments: list[str]) -> None:
    """Do the runs in these directories, one after another; what becomes of one does not concern the others."""
    if arguments[:1] == [HERE]:
        run(Path(arguments[1]))
        return
    _end_with_parent()
    for directory in map(Path, arguments):
        forget_failure(directory)
        request = read_json(directory / REQUEST) or {}
        if request.get("probe"):
            _in_process(probe, directory)
        if (reason := _in_process(run, directory)) is not None and not has_failed(directory):
            fail(directory, reason)


def run(directory: Path) -> None:
    """Train what a directory asks for, or go on with it, evaluate and measure it, and write the result.

    A result that has a part of what is asked for is completed, by what was trained.

    Raises:
        PEFTError: The run was stopped before its end.
    """
    # Further ranks of a run are let in by the first, which is at work there.
    with nullcontext() if os.environ.get("LOCAL_RANK", "0") != "0" else locked(directory):
        request: Any = read_json(directory / REQUEST)
        result = read_json(directory / RESULT) or {}
        if result.get("fingerprint") != request["fingerprint"]:
            result = {}
        if is_finished(result, request["stages"]):
            return
        request["origins"] = note_origin(directory)
        if result and (directory / TRAINED).is_dir():
            _complete(directory, request, result)
        else:
            _train(directory, request)


def probe(directory: Path) -> None:
    """Write the names of what the module logs in validation and test, by a batch of each."""
    request: Any = read_json(directory / REQUEST)
    logged = {}
    for stage in ("validate", "test"):
        limit = f"--trainer.limit_{'val' if stage == 'validate' else 'test'}_batches=1"
        with suppress(PEFTError):  # no such data, which the run itself will say if it is asked for
            logged[stage] = _metrics(_Command([stage, f"--config={directory / CONFIG}", limit]).trainer)
    write_json(Path(request["probe"]), {"fingerprint": request["fingerprint"], **logged})


def _train(directory: Path, request: dict[str, Any]) -> None:
    command = _Command(["fit", f"--config={directory / CONFIG}", "--ckpt_path=last"])
    trainer, module, data = command.trainer, command.model, command.datamodule
    if not trainer.state.finished or trainer.interrupted:
        raise PEFTError("The run was stopped before its end.")
    result = {"name": request["name"], "fingerprint": request["fingerprint"], "steps": trainer.global_step}
    result |= {"diverged": getattr(trainer.strategy, "_diverged", None), **command.meter.measured()}
    if result["diverged"]:
        _write(trainer, directory, request, result)
        return
    trained = directory / TRAINED
    trainer.save_checkpoint(trained, weights_only=True, storage_options=AdapterDirectory())
    result["bytes"] = bytes_of(trained)
    first = FirstCall()
    for stage in ("validate", "test"):
        if stage in request["stages"]:
            with first.watching(module):
                getattr(trainer, stage)(module, datamodule=data, verbose=False)
            result[stage] = _metrics(trainer)
    _measure(trainer, module, first, request, result)
    _write(trainer, directory, request, result)


def _complete(directory: Path, request: dict[str, Any], result: dict[str, Any]) -> None:
    missing = [stage for stage in request["stages"] if stage not in result]
    first = FirstCall()
    stage = "test" if "test" in missing else "validate"

    class Watched(_Command):
        def _run_subcommand(self, subcommand: str) -> None:
            with first.watching(self.model):
                super()._run_subcommand(subcommand)

    command = Watched([stage, f"--config={directory / CONFIG}", f"--ckpt_path={directory / TRAINED}"])
    result.setdefault(stage, _metrics(command.trainer))
    _measure(command.trainer, command.model, first, request, result)
    _write(command.trainer, directory, request, result)


def _measure(
    trainer: Trainer, module: LightningModule, first: FirstCall, request: dict[str, Any], result: dict[str, Any]
) -> None:
    if "latency" in request["stages"]:
        result["latency"] = latencies(trainer, module, first)


def _write(trainer: Trainer, directory: Path, request: dict[str, Any], result: dict[str, Any]) -> None:
    """Write the result; what it was made from goes when nobody will ask for more."""
    if not trainer.is_global_zero:
        return
    write_json(directory / RESULT, {**result, "origins": request["origins"]})
    shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)
    if "latency" in request["stages"] and not request["keep"]:
        shutil.rmtree(directory / TRAINED, ignore_errors=True)


def _metrics(trainer: Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def _in_process(function: Callable[[Path], None], directory: Path) -> str | None:
    """Call a function in a process of its own, whose output is the log; return why it failed, if it did."""
    can_fork = sys.platform == "linux" and not torch.cuda.is_initialized()
    context: Any = multiprocessing.get_context("fork" if can_fork else "spawn")
    process = context.Process(target=_logged, args=(function, directory))
    process.start()
    process.join()
    status = process.exitcode
    if status == 0:
        return None
    if status < 0:
        name = signal.Signals(-status).name
        return f"killed by {name}{', perhaps for want of memory' if name == 'SIGKILL' else ''}"
    lines = (directory / LOG).read_text(errors="replace").strip().splitlines()
    return f"ended with status {status}: {lines[-1] if lines else 'its log is empty'}"


def _logged(function: Callable[[Path], None], directory: Path) -> None:
    _end_with_parent()
    with (directory / LOG).open("ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.argv = [sys.argv[0], HERE, str(directory)]
    try:
        function(directory)
    except Exception as error:
        traceback.print_exc()
        if function is run:
            fail(directory, f"{type(error).__name__}: {error}")
        sys.exit(1)


def _end_with_parent() -> None:
    """Have this process told to end when its parent has died: what nobody waits for shall not hold a device."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    main(sys.argv[1:])
