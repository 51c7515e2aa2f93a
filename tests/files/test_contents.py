"""JSON and tensors from files: what is in them, or an error with the path."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lightning_peft import PEFTError
from lightning_peft.files import contents


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "holds a list; a JSON object was expected"),
        ("3", "holds a int"),
        ('{"a": 1, "a": 2}', "'a' stands twice in one object"),
        ('{"x": [{"b": 1, "a": 1, "b": 1}]}', "'b' stands twice in one object"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"a": "' + "x" * 2**23 + '"}', f"has {2**23 + 9} bytes; {2**23} is the limit for a configuration"),
    ],
)
def test_json_that_is_refused(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "it.json"
    file.write_text(text)
    with pytest.raises(PEFTError) as refusal:
        contents.read_json(file)
    assert words in str(refusal.value)
    assert str(file) in str(refusal.value)


def test_json_of_eight_mebibytes_is_read(tmp_path: Path) -> None:
    content = {"b": "x" * (2**23 - 9), "ä": [1, None]}
    text = json.dumps(content, ensure_ascii=False).encode()
    content["b"] = content["b"][: len(content["b"]) - (len(text) - 2**23)]
    (tmp_path / "it.json").write_bytes(json.dumps(content, ensure_ascii=False).encode())
    assert (tmp_path / "it.json").stat().st_size == 2**23
    assert contents.read_json(tmp_path / "it.json") == content


def test_json_is_written_for_readers(tmp_path: Path) -> None:
    contents.write_json(tmp_path / "it.json", {"b": 1, "a": [True]})
    assert (tmp_path / "it.json").read_text() == '{\n  "a": [\n    true\n  ],\n  "b": 1\n}\n'


def test_views_are_written_as_tensors_of_their_own(tmp_path: Path) -> None:
    block = torch.arange(6.0).view(2, 3)
    contents.write_tensors(tmp_path / "it.safetensors", {"t": block.T, "row": block[1], "whole": block})
    read = contents.read_tensors(tmp_path / "it.safetensors")
    assert {name: tensor.tolist() for name, tensor in read.items()} == {
        "t": block.T.tolist(), "row": block[1].tolist(), "whole": block.tolist(),
    }  # fmt: skip
    assert contents.read_shapes(tmp_path / "it.safetensors") == {"t": (3, 2), "row": (3,), "whole": (2, 3)}


def test_a_sparse_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(PEFTError, match=r"'b' has changed and is sparse"):
        contents.write_tensors(tmp_path / "it", {"a": torch.ones(1), "b": torch.ones(1).to_sparse()})
    assert not list(tmp_path.iterdir())


def test_what_torch_saved_is_read_where_there_is_nothing_else(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "it.bin")
    assert contents.read_tensors(tmp_path / "it.safetensors")["a"].tolist() == [1, 1]
    save_file({"a": torch.zeros(2)}, tmp_path / "it.safetensors")
    assert contents.read_tensors(tmp_path / "it.safetensors")["a"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.ones(1)], "holds other things than tensors by name"),
        ({"a": 1}, "holds other things than tensors by name"),
        (Path("x"), "cannot be read as tensors"),
    ],
)
def test_what_torch_saved_holds_tensors_alone(content: Any, words: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "it.bin")
    with pytest.raises(PEFTError, match=words):
        contents.read_tensors(tmp_path / "it.safetensors")


def test_what_torch_saved_is_not_compressed(tmp_path: Path) -> None:
    """A small file could hold gigabytes."""
    torch.save({"a": torch.ones(2)}, tmp_path / "plain.bin")
    with zipfile.ZipFile(tmp_path / "plain.bin") as plain, zipfile.ZipFile(tmp_path / "it.bin", "w") as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry), compress_type=zipfile.ZIP_DEFLATED)
    with pytest.raises(PEFTError, match="it is compressed"):
        contents.read_tensors(tmp_path / "it.safetensors")


@pytest.mark.parametrize("name", ["../it", "a/../../it", "/it", ".."])
def test_names_that_lead_out_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(PEFTError, match="lies outside of it"):
        contents.inside(tmp_path, name)
    assert contents.inside(tmp_path, "a/it") == tmp_path / "a" / "it"


@pytest.mark.parametrize(
    ("kept", "is_read"),
    [("model/snapshots/1/other.json", True), ("model/blobs/abc", True), ("model/it.json", False), ("it.json", False)],
)
def test_links_that_lead_out_are_refused(kept: str, is_read: bool, tmp_path: Path) -> None:
    """But for those of the hub's cache."""
    link, real = tmp_path / "model" / "snapshots" / "1" / "it.json", tmp_path / kept
    for path in (link, real):
        path.parent.mkdir(parents=True, exist_ok=True)
    real.write_text("{}")
    link.symlink_to(real)
    if is_read:
        assert contents.read_json(link) == {}
        return
    with pytest.raises(PEFTError, match="which lies outside of its directory"):
        contents.read_json(link)
