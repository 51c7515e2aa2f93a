"""Texts with labels from data files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning_peft.errors import PEFTError
from lightning_peft.tasks.batches.records import Record
from lightning_peft.tasks.data.labelled_data import LabelledData

PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"))
"""What the two texts of a pair are called."""
LABELS = ("label", "gold_label")


class ClassificationData(LabelledData):
    """Texts, or pairs of texts, and labels, as fields of the records of a file.

    A text is in `text`; a pair is in `sentence1` and `sentence2`, or `premise` and `hypothesis`; a label in `label` or
    `gold_label`. So the files of SNLI and MNLI are read as they are; their pairs without a gold label are left out. See
    `LabelledData` for the arguments.
    """

    def setup(self, stage: str) -> None:
        """Find the classes in the training file."""
        self.find_classes(_label(record) for record in self.read("train"))

    def readable(self, predictions: list[Any]) -> list[Any]:
        """Return the labels that numbers of classes stand for."""
        return [self.labels[number] for number in predictions]

    def batches(self, split: str) -> DataLoader[Any]:
        """Return a loader of texts with the numbers of their classes."""
        tokenizer, records = self.load_tokenizer(), self.read(split)
        texts = [_texts(record) for record in records]
        numbers = [0 if split == "predict" else self.number(_label(record), record) for record in records]
        self.tell_of_cuts(split, tokenizer(*_columns(texts)))

        def collate(rows: Sequence[tuple[tuple[str, ...], int]]) -> dict[str, torch.Tensor]:
            batch = tokenizer(
                *_columns([texts for texts, _ in rows]),
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            )
            if split != "predict":
                batch["labels"] = torch.tensor([number for _, number in rows])
            return dict(batch)

        return self.loader(list(zip(texts, numbers, strict=True)), collate, split)


def _texts(record: Record) -> tuple[str, ...]:
    """Return the text of a record, or its two."""
    for first, second in PAIRS:
        if first in record.fields or second in record.fields:
            return record.text(first), record.text(second)
    return (record.text("text"),)


def _columns(texts: Sequence[tuple[str, ...]]) -> list[list[str]]:
    """Return all first texts, and all second ones if there are any."""
    return [list(column) for column in zip(*texts, strict=True)]


def _label(record: Record) -> str:
    name = next((name for name in LABELS if name in record.fields), None)
    if name is None:
        raise PEFTError(f"{record.where}: expected a label in {' or '.join(LABELS)}. Found {sorted(record.fields)}")
    label = record.fields[name]
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise PEFTError(f"{record.where}: field {name!r} is {label!r}; expected a text or a whole number")
    return str(label)
