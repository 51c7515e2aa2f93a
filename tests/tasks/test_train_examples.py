"""Learning from a part of the training file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_peft import PEFTError
from lightning_peft.tasks import ClassificationData, InstructionData, PreferenceData, Seq2SeqData, TokenData

MODULES = [ClassificationData, InstructionData, PreferenceData, Seq2SeqData, TokenData]


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": str(number)}) + "\n" for number in range(5)))
    return str(path)


@pytest.mark.parametrize("kind", MODULES)
def test_the_first_records_are_learned_from(kind: Any, file: str) -> None:
    data = kind(train_file=file, val_file=file, train_examples=3)
    assert [record.fields["text"] for record in data.read("train")] == ["0", "1", "2"]
    assert len(data.read("val")) == 5
    assert len(kind(train_file=file).read("train")) == 5


@pytest.mark.parametrize(("given", "said"), [(6, "has 5 records"), (0, "expected at least one"), (-1, "at least one")])
def test_what_there_is_not_is_refused(given: int, said: str, file: str) -> None:
    with pytest.raises(PEFTError, match=f"train_examples={given} was given.*{said}"):
        InstructionData(train_file=file, train_examples=given).read("train")
