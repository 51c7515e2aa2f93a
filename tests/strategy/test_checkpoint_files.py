"""What a run writes is written by one writer, whoever asks for it, and other runs see where."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from modules import Regression, adapter_state, assert_same, loader, trainer

from lightning_peft import PEFTError
from lightning_peft.callbacks import AdapterCheckpoint
from lightning_peft.storage.checkpoint_directory import AdapterDirectory
from lightning_peft.strategy.checkpoints import WholeFiles


def fit(root: Path, *callbacks: Any, **options: Any) -> Any:
    run = trainer(root, callbacks=[*callbacks], **options)
    run.fit(Regression(), loader())
    return run


@pytest.mark.parametrize("plugins", [[], [TorchCheckpointIO()], [AsyncCheckpointIO()]])
def test_files_are_written_whole_whatever_lightnings_plugin(tmp_path: Path, plugins: list[Any]) -> None:
    run = fit(tmp_path, ModelCheckpoint(tmp_path, filename="file"), plugins=plugins)
    plugin = run.strategy.checkpoint_io
    assert type(getattr(plugin, "checkpoint_io", plugin)) is WholeFiles
    assert [path.name for path in tmp_path.iterdir()] == ["file.ckpt"]
    saved = run.strategy.load_checkpoint(tmp_path / "file.ckpt")
    assert_same(saved["state_dict"], run.strategy.lightning_module_state_dict())


def test_a_plugin_of_the_users_is_left_alone(tmp_path: Path) -> None:
    class Counting(TorchCheckpointIO):
        calls: ClassVar[list[str]] = []

        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            self.calls.append("save")
            super().save_checkpoint(checkpoint, path, storage_options)

        def remove_checkpoint(self, path: Any) -> None:
            self.calls.append("remove")
            super().remove_checkpoint(path)

    savers = [ModelCheckpoint(tmp_path / "files"), AdapterCheckpoint(tmp_path / "directories")]
    fit(tmp_path, *savers, plugins=[Counting()], max_epochs=2)
    assert Counting.calls == ["save", "save", "remove"]
    assert len(list((tmp_path / "directories").iterdir())) == 1


def test_a_file_that_cannot_be_written_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fit(tmp_path, enable_checkpointing=False)
    run.save_checkpoint(tmp_path / "file.ckpt")
    before = (tmp_path / "file.ckpt").read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PEFTError, match=r"Cannot write .*/file\.ckpt: No space left"):
        run.save_checkpoint(tmp_path / "file.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["file.ckpt"]
    assert (tmp_path / "file.ckpt").read_bytes() == before


def test_a_folder_that_cannot_be_written_to_is_found_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "blocker").write_text("a file")

    class Steps(Callback):
        def on_train_start(self, *_: Any) -> None:
            raise AssertionError("training has begun")

    with pytest.raises(PEFTError, match=r"Cannot write .*blocker/checkpoints"):
        fit(tmp_path, AdapterCheckpoint(tmp_path / "blocker" / "checkpoints"), Steps())


@pytest.mark.parametrize("kind", [AdapterCheckpoint, ModelCheckpoint])
def test_a_second_run_in_one_folder_is_told_and_neither_ends(tmp_path: Path, kind: Any) -> None:
    def saver() -> Any:
        return kind(tmp_path / "shared", save_last=True, every_n_train_steps=1, save_top_k=2, monitor="step")

    class Within(Callback):
        def on_train_batch_end(self, run: Any, module: Any, outputs: Any, batch: Any, number: int) -> None:
            if number == 1:
                with pytest.warns(
                    UserWarning, match=rf"Another run writes .*shared \(process {os.getpid()} on .*dirpath"
                ):
                    assert fit(tmp_path, saver()).global_step == 4

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Another run")
        assert fit(tmp_path, saver(), Within()).global_step == 4
        assert fit(tmp_path, saver()).global_step == 4
    assert not [path for path in (tmp_path / "shared").iterdir() if path.name.startswith(".")]


SCRIPT = """
import os, signal, sys
from pathlib import Path
from lightning.pytorch.callbacks import ModelCheckpoint
from modules import Regression, loader, trainer
from lightning_peft.callbacks import AdapterCheckpoint
from lightning_peft.files import writing

root, kind = Path(sys.argv[1]), {kind.__name__: kind for kind in (AdapterCheckpoint, ModelCheckpoint)}[sys.argv[2]]
move, count = writing._move, [0]

def killed(place, target):
    count[0] += 1
    if count[0] == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    move(place, target)

writing._move = killed
saver = kind(root, save_last=True, save_top_k=0, every_n_train_steps=1)
trainer(root, callbacks=[saver]).fit(Regression(), loader())
"""


@pytest.mark.parametrize(
    ("kind", "ckpt_path"),
    [
        (AdapterCheckpoint, "last"),
        (ModelCheckpoint, None),
        pytest.param(AdapterCheckpoint, None, marks=pytest.mark.slow),
        pytest.param(ModelCheckpoint, "last", marks=pytest.mark.slow),
    ],
)
def test_what_a_killed_run_left_goes_at_the_next_start(tmp_path: Path, kind: Any, ckpt_path: Any) -> None:
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path), kind.__name__]
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len([path for path in tmp_path.iterdir() if path.name.startswith(".")]) == 2  # what it wrote, and its claim
    run = trainer(tmp_path, callbacks=[kind(tmp_path, save_last=True, save_top_k=0)], max_steps=4)
    run.fit(Regression(), loader(), ckpt_path=ckpt_path)
    assert run.global_step == 4
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_directories_are_removed_at_once_and_links_are_not_followed(tmp_path: Path) -> None:
    run = fit(tmp_path, enable_checkpointing=False)
    run.save_checkpoint(tmp_path / "directory", storage_options=AdapterDirectory())
    (tmp_path / "link").symlink_to("directory")
    run.strategy.remove_checkpoint(tmp_path / "link")
    assert [path.name for path in tmp_path.iterdir()] == ["directory"]
    run.strategy.remove_checkpoint(tmp_path / "directory")
    run.strategy.remove_checkpoint(tmp_path / "gone")
    assert not list(tmp_path.iterdir())


REMOTE = "memory://folder/file.ckpt"


def changed(change: Callable[[bytes], bytes]) -> None:
    system, place = fsspec.core.url_to_fs(REMOTE)
    system.pipe(place, change(system.cat(place)))


def test_a_remote_file_goes_lightnings_way(tmp_path: Path) -> None:
    run = fit(tmp_path, enable_checkpointing=False)
    run.save_checkpoint(REMOTE)
    saved = run.strategy.load_checkpoint(REMOTE)
    assert isinstance(next(iter(saved["state_dict"].values())), torch.Tensor)
    resumed = trainer(tmp_path, max_epochs=2, enable_checkpointing=False)
    resumed.fit(Regression(), loader(), ckpt_path=REMOTE)
    assert resumed.global_step == 2 * run.global_step
    run.strategy.remove_checkpoint(REMOTE)
    with pytest.raises(FileNotFoundError):
        run.strategy.load_checkpoint(REMOTE)


def test_a_file_of_a_web_server_that_knows_no_parts_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))  # where torch keeps what it has got
    run = fit(tmp_path, enable_checkpointing=False)
    run.save_checkpoint(tmp_path / "one.ckpt")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/one.ckpt"
        resumed = trainer(tmp_path, max_epochs=2, enable_checkpointing=False)
        resumed.fit(Regression(), loader(), ckpt_path=url)
        assert resumed.global_step == 2 * run.global_step
        assert_same(adapter_state(Regression.load_from_checkpoint(url)), adapter_state(run.lightning_module))
        server.shutdown()


@pytest.mark.parametrize(
    "load", [lambda run: run.strategy.load_checkpoint(REMOTE), lambda _: Regression.load_from_checkpoint(REMOTE)]
)
def test_a_remote_file_that_is_not_what_was_written(tmp_path: Path, load: Callable[[Any], Any]) -> None:
    run = fit(tmp_path, enable_checkpointing=False)
    run.save_checkpoint(REMOTE)
    tensor = next(iter(adapter_state(run.lightning_module).values())).numpy().tobytes()
    flipped = bytes([tensor[0] ^ 1]) + tensor[1:]
    changed(lambda content: content.replace(tensor, flipped, 1))
    with pytest.raises(PEFTError, match=rf"{REMOTE} is damaged: .* is not what was written"):
        load(run)


def test_remote_files_that_are_cut_off_or_hold_objects(tmp_path: Path) -> None:
    run = fit(tmp_path, enable_checkpointing=False)
    run.save_checkpoint(REMOTE)
    changed(lambda content: content[:-100])
    with pytest.raises(PEFTError, match=rf"{REMOTE} is damaged or truncated"):
        run.strategy.load_checkpoint(REMOTE)
    run.lightning_module.save_hyperparameters({"path": tmp_path})
    with pytest.warns(UserWarning, match="holds more than tensors"):
        run.save_checkpoint(REMOTE)
    with pytest.raises(PEFTError, match=rf"{REMOTE} holds more .*PosixPath.*weights_only=False"):
        run.strategy.load_checkpoint(REMOTE)


def test_remote_directories_are_refused_before_training(tmp_path: Path) -> None:
    run = trainer(tmp_path, callbacks=[AdapterCheckpoint("memory://folder")])
    with pytest.raises(PEFTError, match=r"memory://folder: adapter directories are written to local paths"):
        run.fit(Regression(), loader())
    assert run.global_step == 0
