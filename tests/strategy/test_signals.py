"""Whatever ends a run, a checkpoint is there from which it goes on to the same end, and no model is half merged."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import clean_environment
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from modules import BATCH, Regression, adapter_state, assert_same, base_state, trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_peft import LoRA, PEFTStrategy, unmerge
from lightning_peft.callbacks import AdapterCheckpoint
from lightning_peft.files import writing
from lightning_peft.operations import merge as merging
from lightning_peft.operations.merge import is_merged
from lightning_peft.tasks.batches.resumable import ResumableLoader

SCRIPTS = Path(__file__).parents[1] / "scripts"
DATA = TensorDataset(torch.randn(6 * BATCH, 8, generator=torch.Generator().manual_seed(0)))
AT, STEPS = 7, 16


@pytest.fixture(autouse=True)
def _handles_interrupts() -> Iterator[None]:
    """Take Ctrl-C as Python does, also where the tests run in the background of a shell, which has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Ended(Regression):
    """Calls ``end`` in the step, or the validation after the step, that has the number ``AT``."""

    def __init__(self, phase: str = "", end: Callable[[], Any] = lambda: None) -> None:
        super().__init__()
        self.phase, self.end, self.ended = phase, end, False

    def at(self, phase: str) -> None:
        if self.phase == phase and self.global_step >= AT and not self.ended:
            self.ended = True
            self.end()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.at("step")
        return self.loss(batch[0] + 0.1 * torch.randn(()))

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.at("validation")


def fit(root: Path, module: Any, kind: Any = AdapterCheckpoint, callbacks: Any = (), **resume: Any) -> Any:
    saver = kind(root, save_last=True, every_n_train_steps=3, filename="{step}")
    run = trainer(
        root,
        PEFTStrategy(LoRA(r=2)),
        callbacks=[*callbacks, saver],
        max_steps=STEPS,
        max_epochs=-1,
        val_check_interval=4,
    )
    torch.manual_seed(1 if not resume else 2)
    validation = ResumableLoader(DATA, batch_size=BATCH)
    try:
        run.fit(module, ResumableLoader(DATA, batch_size=BATCH), validation, **resume)
    finally:
        module.steps = run.global_step
    return run


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    module = Ended()
    fit(tmp_path_factory.mktemp("uninterrupted"), module)
    unmerge(module)
    return adapter_state(module)


def kill(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory (simulated)")


ENDS = {
    "SIGTERM": (kill(signal.SIGTERM), SystemExit),
    "SIGUSR1": (kill(signal.SIGUSR1), SystemExit),
    "SIGINT": (kill(signal.SIGINT), SystemExit),
    "out of memory": (out_of_memory, torch.OutOfMemoryError),
}


@pytest.mark.parametrize("kind", [AdapterCheckpoint, ModelCheckpoint])
@pytest.mark.parametrize("phase", ["step", "validation", "save"])
@pytest.mark.parametrize("end", ENDS)
def test_a_run_goes_on_to_the_same_end(
    tmp_path: Path, uninterrupted: Any, end: str, phase: str, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGINT)
    act, error = ENDS[end]
    module, move = Ended(phase, act), writing._move

    def interrupted(place: Path, target: Path) -> None:
        module.at("save")
        move(place, target)

    monkeypatch.setattr(writing, "_move", interrupted)
    with pytest.raises(error):
        fit(tmp_path, module, kind)
    signal.signal(signal.SIGINT, before[1])  # Lightning leaves it ignored, and the process would end
    assert module.ended
    assert (signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGINT)) == before
    resumed = Ended()
    fit(tmp_path, resumed, kind, ckpt_path="last")
    assert resumed.steps == STEPS
    unmerge(resumed)
    assert_same(adapter_state(resumed), uninterrupted)


@pytest.mark.parametrize("end", ["SIGTERM", "SIGUSR1"])
def test_who_tells_a_run_to_end_loses_no_step(tmp_path: Path, end: str) -> None:
    class Noting(Callback):
        step = 0

        def on_train_start(self, run: Any, *_: Any) -> None:
            self.step = run.global_step

    with pytest.raises(SystemExit):
        fit(tmp_path, Ended("step", ENDS[end][0]))
    noting = Noting()
    fit(tmp_path, Ended(), callbacks=[noting], ckpt_path="last")
    assert noting.step == AT + 1


def test_a_handler_of_the_users_stays(tmp_path: Path) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    try:
        fit(tmp_path, module := Ended("step", kill(signal.SIGUSR1)))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == [signal.SIGUSR1]
    assert module.steps == STEPS


@pytest.mark.parametrize("end", ENDS)
def test_no_model_is_half_merged(tmp_path: Path, uninterrupted: Any, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, count, fold = signal.getsignal(signal.SIGINT), [0], merging.fold_into

    def interrupted(*args: Any, **options: Any) -> Any:
        count[0] += 1
        if count[0] == 2:
            ENDS[end][0]()
        return fold(*args, **options)

    monkeypatch.setattr(merging, "fold_into", interrupted)
    module = Ended()
    try:
        fit(tmp_path, module)
        assert end in ("SIGTERM", "SIGUSR1")  # the run has ended, and ends as it would have
    except (SystemExit, torch.OutOfMemoryError):
        assert not is_merged(module)
    finally:
        signal.signal(signal.SIGINT, before)
    assert count[0] >= 2
    if is_merged(module):
        unmerge(module)
    assert_same(base_state(module), base_state(Regression()))
    assert_same(adapter_state(module), uninterrupted)


class Dying(Dataset[Tensor]):
    """Ends the worker that reads its item 13."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Tensor:
        if index == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.randn(8)


class OfItems(Regression):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch)


def test_a_dead_worker_is_an_error_and_the_checkpoint_is_whole(tmp_path: Path) -> None:
    saver = AdapterCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    run = trainer(tmp_path, callbacks=[saver])
    started = time.monotonic()
    # torch's own, or the pipe's if that is read first.
    with pytest.raises((RuntimeError, ConnectionError), match=r"worker|reset by peer"):
        run.fit(OfItems(), DataLoader(Dying(), batch_size=BATCH, num_workers=1))
    assert time.monotonic() - started < 60
    assert run.strategy.load_checkpoint(tmp_path / "last")["global_step"] >= 1


def test_a_dead_rank_ends_the_others_in_bounded_time(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "dead_rank_script.py"), str(tmp_path)]
    started = time.monotonic()
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode
    assert time.monotonic() - started < 150
    assert trainer(tmp_path).strategy.load_checkpoint(tmp_path / "checkpoints" / "last")["global_step"] == 6
