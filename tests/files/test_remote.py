"""Files here and elsewhere, by fsspec's file system in memory."""

from pathlib import Path

import fsspec
import pytest

from lightning_peft.files.remote import is_file, is_remote, opened


def test_files_are_read_wherever_they_are(tmp_path: Path) -> None:
    for path in (str(tmp_path / "file"), "memory://folder/file"):
        assert not is_file(path)
        with pytest.raises(FileNotFoundError):
            opened(path)
        with fsspec.open(path, "wb") as file:
            file.write(b"content")
        assert is_file(path)
        with opened(path) as file:
            assert file.read() == b"content"
    assert is_remote("memory://folder/file")
    assert not is_remote(tmp_path / "file")


def test_nothing_is_asked_of_a_web_server() -> None:
    assert not is_file("https://127.0.0.1:1/file.ckpt")
