"""What a run was made from: every file that its config reads, none that it writes."""

from pathlib import Path
from typing import Any

import pytest

from lightning_peft.comparison.origins import differing, origin

STRANGE = ["a\0b", "x" * 999, ".", "..", "/", "/dev/null", ""]
"""Texts that are no paths, and paths of what is around a run or is no file."""


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "weights").write_bytes(b"w" * 3 * 2**20)
    for name in ("train.jsonl", "text.jsonl", "out"):
        (tmp_path / name).write_text("abc")
    saver = {"class_path": "Saver", "init_args": {"dirpath": str(tmp_path / "out")}}
    forgetting = {"class_path": "Forgetting", "init_args": {"file": str(tmp_path / "text.jsonl")}}
    return {
        "seed_everything": 0,
        "trainer": {"max_steps": 3, "callbacks": [saver, forgetting]},
        "model": {
            "class_path": "CausalLM",
            "init_args": {"model": str(tmp_path / "base"), "stop": STRANGE},
        },
        "data": {"init_args": {"train_file": str(tmp_path / "train.jsonl"), "val_file": str(tmp_path / "none.jsonl")}},
    }


def at_the_end(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1] + b"x")


def in_the_middle(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] + b"x" + content[len(content) // 2 + 1 :])


def longer(file: Path) -> None:
    file.write_bytes(file.read_bytes() + file.read_bytes()[:1])


@pytest.mark.parametrize("change", [at_the_end, in_the_middle, longer])
@pytest.mark.parametrize("name", ["base/weights", "train.jsonl", "text.jsonl"])
def test_another_file_is_another_origin(name: str, change: Any, config: dict[str, Any], tmp_path: Path) -> None:
    before = origin(config)
    assert origin(config) == before
    change(tmp_path / name)
    assert list(differing([before, origin(config)])) == [str(tmp_path / name.split("/")[0])]


def test_what_a_run_writes_is_none_of_its_origins(config: dict[str, Any], tmp_path: Path) -> None:
    before = origin(config)
    longer(tmp_path / "out")
    assert origin(config) == before
    read = {str(tmp_path / name) for name in ("base", "train.jsonl", "text.jsonl")}
    assert before.keys() == {"lightning_peft", "torch", *read}
