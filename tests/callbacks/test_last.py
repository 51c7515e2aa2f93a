"""What ``ckpt_path="last"`` means when the last checkpoint is not whole, and links to it."""

import inspect
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from modules import Regression, SteppedRegression, assert_same, loader, trainer

from lightning_peft import PEFTError
from lightning_peft.callbacks import AdapterCheckpoint
from lightning_peft.callbacks import last as seams

KINDS = pytest.mark.parametrize("kind", [AdapterCheckpoint, ModelCheckpoint])


def fit(root: Path, kind: Any, steps: int, ckpt_path: Any = "last", **options: Any) -> tuple[Any, Any]:
    options = {"save_last": True, "save_top_k": 2, "monitor": "step", "mode": "max", **options}
    saver = kind(root, every_n_train_steps=2, filename="{step}", enable_version_counter=False, **options)
    module, run = SteppedRegression(), trainer(root, max_steps=steps, callbacks=[saver])
    run.fit(module, loader(), ckpt_path=ckpt_path)
    return module, run


def in_it(path: Path) -> Path:
    """A file of a checkpoint that is read."""
    return path / "trainer_state.ckpt" if path.is_dir() else path


def cut_off(path: Path) -> None:
    file = in_it(path)
    file.write_bytes(file.read_bytes()[:-200])


def flipped(path: Path) -> None:
    file = in_it(path)
    content = bytearray(file.read_bytes())
    content[content.index(b"global_step")] ^= 1
    file.write_bytes(content)


def emptied(path: Path) -> None:
    in_it(path).write_bytes(b"")


def linked_to_nothing(path: Path) -> None:
    remove(path)
    path.symlink_to("step=1000")


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


DAMAGES: list[Callable[[Path], None]] = [cut_off, flipped, emptied, linked_to_nothing, remove]


@KINDS
@pytest.mark.parametrize("damage", DAMAGES)
def test_the_run_goes_on_from_the_newest_that_is_whole(tmp_path: Path, kind: Any, damage: Any) -> None:
    straight, _ = fit(tmp_path / "straight", kind, 6)
    fit(tmp_path, kind, 4)
    last = tmp_path / f"last{kind.FILE_EXTENSION}"
    damage(last)
    for step in (2, 4):
        os.utime(tmp_path / f"step={step}{kind.FILE_EXTENSION}", (step, step))
    cut_off(tmp_path / f"step=4{kind.FILE_EXTENSION}")
    os.utime(in_it(tmp_path / f"step=4{kind.FILE_EXTENSION}"), (4, 4))
    broken = "there is no last one" if damage is remove else f"{last} is damaged, cut off or a link to nothing"
    with pytest.warns(UserWarning, match=rf"{broken}.*goes on from the newest that is whole, .*step=2"):
        resumed, run = fit(tmp_path, kind, 6)
    assert run.global_step == 6
    assert_same(resumed.state_dict(), straight.state_dict())


@KINDS
def test_without_a_whole_one_nothing_is_lost(tmp_path: Path, kind: Any) -> None:
    fit(tmp_path, kind, 4)
    for path in [path for path in tmp_path.iterdir() if path.name.startswith(("last", "step"))]:
        cut_off(path)
    with pytest.raises(PEFTError, match=r"last.* is damaged.*there is no other. Leave ckpt_path out"):
        fit(tmp_path, kind, 6)


@KINDS
@pytest.mark.parametrize("options", [{"save_last": None}, {"save_weights_only": True}])
def test_what_was_not_asked_for_is_not_resumed_from(tmp_path: Path, kind: Any, options: dict[str, Any]) -> None:
    (tmp_path / "mine").mkdir()
    _, run = fit(tmp_path, kind, 2, **options)
    shutil.rmtree(tmp_path / "last", ignore_errors=True)
    (tmp_path / "last.ckpt").unlink(missing_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the newest that is whole")
        _, run = fit(tmp_path, kind, 2, **options)
    assert run.global_step == 2


@KINDS
def test_a_kill_before_the_link_is_renewed(tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By then the checkpoint that the link is to has been removed."""
    straight, _ = fit(tmp_path / "straight", kind, 6, save_last="link", save_top_k=1)

    class Killed(BaseException):
        pass

    def killed(source: Any, path: Any) -> None:
        if "step=4" in str(source):
            raise Killed
        link(source, path)

    link = seams.replace_link
    with monkeypatch.context() as patch:
        patch.setattr(seams, "replace_link", killed)
        with pytest.raises(Killed):
            fit(tmp_path, kind, 6, save_last="link", save_top_k=1)
    last = tmp_path / f"last{kind.FILE_EXTENSION}"
    assert last.is_symlink()
    assert not last.exists()
    with pytest.warns(UserWarning, match=r"goes on from the newest that is whole, .*step=4"):
        resumed, _ = fit(tmp_path, kind, 6, save_last="link", save_top_k=1)
    assert_same(resumed.state_dict(), straight.state_dict())
    assert last.exists()


@KINDS
@pytest.mark.parametrize(("first", "then"), [("link", True), (True, "link"), ("link", "link")])
def test_links_and_checkpoints_take_each_others_place(tmp_path: Path, kind: Any, first: Any, then: Any) -> None:
    fit(tmp_path, kind, 2, save_last=first)
    last = tmp_path / f"last{kind.FILE_EXTENSION}"
    assert last.is_symlink() == (first == "link")
    if first == "link" and then is True:
        remove(tmp_path / os.readlink(last))  # as a kill leaves it
    fit(tmp_path, kind, 4, None, save_last=then)
    assert last.is_symlink() == (then == "link")
    assert fit(tmp_path, kind, 6)[1].global_step == 6
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_other_strategies_do_as_lightning_does(tmp_path: Path) -> None:
    def fit_stock(steps: int) -> L.Trainer:
        saver = ModelCheckpoint(tmp_path, save_last="link", every_n_train_steps=2)
        run = trainer(tmp_path, "auto", max_steps=steps, callbacks=[saver])
        run.fit(Regression(), loader(), ckpt_path="last")
        return run

    fit_stock(2)
    assert (tmp_path / "last.ckpt").is_symlink()
    linked_to_nothing(tmp_path / "last.ckpt")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the newest that is whole")
        assert fit_stock(4).global_step == 4


def test_the_private_seams_of_links_are_where_they_were() -> None:
    assert ModelCheckpoint._find_last_checkpoints is seams._find_last_whole
    assert ModelCheckpoint._link_checkpoint is seams._link_whole
    assert list(inspect.signature(seams._find_last).parameters) == ["self", "trainer"]
    assert list(inspect.signature(seams._link).parameters) == ["trainer", "filepath", "linkpath"]
