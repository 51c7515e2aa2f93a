"""Whatever happens while something is written, the old one or the new one is there, whole, and nothing else is left."""

import errno
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft import PEFTError, load_adapter
from lightning_peft.files import leftovers
from lightning_peft.files.contents import MARKER, write_tensors
from lightning_peft.files.leftovers import Claim, clean, restore_interrupted
from lightning_peft.files.writing import atomic_directory, atomic_file, remove, replace_link

OLD, NEW = "old" * 50, "new" * 50


def directory(path: Path, content: str) -> None:
    with atomic_directory(path) as staging:
        for file in (MARKER, "first", "second"):
            (staging / file).write_text(content)


def file(path: Path, content: str) -> None:
    with atomic_file(path) as staging:
        staging.write(content[:75].encode())
        staging.write(content[75:].encode())


def link(path: Path, content: str) -> None:
    source = path.parent / content[:3]
    source.write_text(content)
    replace_link(source, path)


def read(path: Path) -> str:
    """What ``path`` holds: half of it would be another value, or a missing file."""
    if path.is_dir():
        (content,) = {(path / file).read_text() for file in (MARKER, "first", "second")}
        return content
    return path.read_text()


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"old", "new"}


WRITERS = [directory, file, link]
# What is written over what; a directory is never put in the place of a file that is there.
PAIRS = [(old, new) for old in WRITERS for new in WRITERS if not (old is not directory and new is directory)]
pairs = pytest.mark.parametrize(("before", "after"), PAIRS, ids=lambda writer: writer.__name__)
calls = pytest.mark.parametrize("call", ["fsync", "replace", "rename", "mkdir", "symlink", "open"])


def break_down(call: str, count: int, fault: Callable[[], Any], patch: Callable[..., Any]) -> list[str]:
    """Have the ``count``-th call of ``os.call`` end in ``fault``."""
    real, made = getattr(os, call), []

    def broken(*args: Any, **options: Any) -> Any:
        made.append(call)
        if len(made) == count:
            fault()
        return real(*args, **options)

    patch(os, call, broken)
    return made


def outcome_of(write: Callable[[], None]) -> str:
    try:
        write()
    except PEFTError as error:
        return str(error)
    return "written"


@pairs
@calls
def test_a_failing_call_leaves_the_old_one_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: Any, after: Any, call: str
) -> None:
    def fail() -> None:
        raise OSError(errno.EIO, "Input/output error")

    for count in range(1, 9):
        before(tmp_path / "it", OLD)
        with monkeypatch.context() as patch:
            made = break_down(call, count, fail, patch.setattr)
            outcome = outcome_of(lambda: after(tmp_path / "it", NEW))
        assert outcome.startswith(("written", f"Cannot write {tmp_path / 'it'}: Input/output error"))
        restore_interrupted(tmp_path / "it")
        assert read(tmp_path / "it") in (OLD, NEW)
        clean(tmp_path)
        assert left(tmp_path) == {"it"}
        remove(tmp_path / "it")
        if len(made) < count:
            return
    raise AssertionError(f"os.{call} was called more often than was tried")


@pairs
@pytest.mark.parametrize("call", ["fsync", "replace", "rename", "mkdir", "symlink", "unlink", "rmdir"])
def test_a_kill_leaves_the_old_one_or_the_new_one(tmp_path: Path, before: Any, after: Any, call: str) -> None:
    for count in range(1, 9):
        before(tmp_path / "it", OLD)
        child = os.fork()
        if not child:
            break_down(call, count, lambda: os.kill(os.getpid(), signal.SIGKILL), setattr)
            after(tmp_path / "it", NEW)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        clean(tmp_path)
        assert read(tmp_path / "it") == NEW if not status else read(tmp_path / "it") in (OLD, NEW)
        assert left(tmp_path) == {"it"}
        remove(tmp_path / "it")
        if not status:
            return
    raise AssertionError(f"os.{call} was called more often than was tried")


def test_an_interrupt_between_two_renames_brings_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory(tmp_path / "it", OLD)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        break_down("replace", 2, interrupt, patch.setattr)
        with pytest.raises(KeyboardInterrupt):
            directory(tmp_path / "it", NEW)
    assert read(tmp_path / "it") == OLD
    assert left(tmp_path) == {"it"}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_link_to_nothing_is_replaced(tmp_path: Path, writer: Any) -> None:
    (tmp_path / "it").symlink_to("gone")
    writer(tmp_path / "it", NEW)
    assert read(tmp_path / "it") == NEW
    assert left(tmp_path) == {"it"}


def test_a_link_to_a_directory_is_replaced_and_not_what_it_is_to(tmp_path: Path) -> None:
    directory(tmp_path / "target", OLD)
    for writer in WRITERS:
        (tmp_path / "it").symlink_to("target")
        writer(tmp_path / "it", NEW)
        assert read(tmp_path / "it") == NEW
        assert read(tmp_path / "target") == OLD
        remove(tmp_path / "it")


@pytest.mark.parametrize("writer", WRITERS)
def test_what_is_not_ours_is_not_replaced(tmp_path: Path, writer: Any) -> None:
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "thesis.txt").write_text("years of work")
    with pytest.raises(PEFTError, match="not written by lightning_peft"):
        writer(tmp_path / "it", NEW)
    assert (tmp_path / "it" / "thesis.txt").read_text() == "years of work"


def test_removing_at_no_moment_leaves_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory(tmp_path / "it", OLD)
    with monkeypatch.context() as patch:
        patch.setattr("lightning_peft.files.writing.discard", lambda _: None)  # killed before it is removed
        remove(tmp_path / "it")
    assert not (tmp_path / "it").exists()
    clean(tmp_path)
    assert left(tmp_path) == set()
    remove(tmp_path / "it")


@pytest.mark.parametrize("writer", WRITERS)
def test_removing_what_cannot_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: Any) -> None:
    writer(tmp_path / "it", OLD)

    def fail(*_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(PEFTError, match=r"Cannot remove .*/it: Read-only"):
        remove(tmp_path / "it")
    assert read(tmp_path / "it") == OLD


def test_cleaning_leaves_what_is_being_written_and_what_is_not_ours(tmp_path: Path) -> None:
    others = {".bashrc", ".bashrc.old", "it.12345678.tmp", ".it.tmp", ".it.1234567g.tmp"}
    for name in others:
        (tmp_path / name).write_text("mine")
    with atomic_directory(tmp_path / "one") as staging, atomic_file(tmp_path / "two") as written:
        clean(tmp_path)
        (staging / MARKER).write_text("one")
        written.write(b"two")
    assert left(tmp_path) == {*others, "one", "two"}


def test_what_two_moved_aside_comes_back_as_the_newest(tmp_path: Path) -> None:
    for number, name in enumerate((".it.00000001.old", ".it.00000000.old")):
        directory(tmp_path / name, str(number))
        os.utime(tmp_path / name, (number, number))
    clean(tmp_path)
    assert read(tmp_path / "it") == "1"
    assert left(tmp_path) == {"it"}


def test_two_writers_and_a_reader(tmp_path: Path) -> None:
    directory(tmp_path / "it", OLD)
    children = []
    for content in (OLD, NEW):
        if not (child := os.fork()):
            try:
                for _ in range(60):
                    directory(tmp_path / "it", content)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    for _ in range(60):
        clean(tmp_path)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert read(tmp_path / "it") in (OLD, NEW)
    clean(tmp_path)
    assert left(tmp_path) == {"it"}


@pytest.mark.parametrize("what", ["tensors", "state in a directory", "state in a file"])
def test_a_full_disk_as_libraries_report_it(tmp_path: Path, what: str) -> None:
    content = {"a": torch.randn(10_000)}

    def write() -> None:
        if what == "state in a file":
            with atomic_file(tmp_path / "it") as file:
                torch.save(content, file)
            return
        with atomic_directory(tmp_path / "it") as staging:
            if what == "tensors":
                write_tensors(staging / "tensors", content)
            else:
                with (staging / "state").open("wb") as file:
                    torch.save(content, file)

    message, status = os.pipe(), 1
    if not (child := os.fork()):
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
            write()
        except PEFTError as error:
            os.write(message[1], str(error).encode())
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert f"Cannot write {tmp_path / 'it'}: " in (text := os.read(message[0], 1000).decode())
    assert "File too large" in text
    assert left(tmp_path) == set()


def test_another_run_in_a_folder_is_seen(tmp_path: Path) -> None:
    first = Claim(tmp_path / "folder")
    assert first.other is None
    second = Claim(tmp_path / "folder")
    assert f"process {os.getpid()} on " in str(second.other)
    second.release()
    first.release()
    assert left(tmp_path / "folder") == set()
    assert Claim(tmp_path / "folder").other is None


def test_a_folder_that_is_released_meanwhile_is_not_claimed_by_a_file_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, real = Claim(tmp_path / "folder"), leftovers.lock

    def lock(descriptor: int) -> bool | None:
        monkeypatch.setattr(leftovers, "lock", real)
        first.release()
        return real(descriptor)

    monkeypatch.setattr(leftovers, "lock", lock)
    second = Claim(tmp_path / "folder")
    assert second.other is None
    assert f"process {os.getpid()} on " in str(Claim(tmp_path / "folder").other)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_name_that_no_file_can_have_is_said(name: str, tmp_path: Path) -> None:
    with (
        pytest.raises(PEFTError, match=r"There can be nothing at .* Give another"),
        atomic_file(tmp_path / name),
    ):
        raise AssertionError
    with pytest.raises(PEFTError, match="There can be nothing at"):
        load_adapter(nn.Linear(2, 2), tmp_path / name)
