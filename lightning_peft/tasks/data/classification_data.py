"""Texts with labels from data files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning_peft.errors import PEFTError
from lightning_peft.tasks.batches.records import Record
from lightning_peft.tasks.data.labelled_data import LabelledData


class ClassificationData(LabelledData):
    """Texts and labels: fields `text` and `label` of the records of a file. See `LabelledData` for the arguments."""

    def setup(self, stage: str) -> None:
        """Find the classes in the training file."""
        self.find_classes(_label(record) for record in self.read("train"))

    def readable(self, predictions: list[Any]) -> list[Any]:
        """Return the labels that numbers of classes stand for."""
        return [self.labels[number] for number in predictions]

    def batches(self, split: str) -> DataLoader[Any]:
        """Return a loader of texts with the numbers of their classes."""
        tokenizer, records = self.load_tokenizer(), self.read(split)
        texts = [record.text("text") for record in records]
        numbers = [0 if split == "predict" else self.number(_label(record), record) for record in records]
        self.tell_of_cuts(split, tokenizer(texts))

        def collate(rows: Sequence[tuple[str, int]]) -> dict[str, torch.Tensor]:
            texts = [text for text, _ in rows]
            batch = tokenizer(texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
            if split != "predict":
                batch["labels"] = torch.tensor([number for _, number in rows])
            return dict(batch)

        return self.loader(list(zip(texts, numbers, strict=True)), collate, split)


def _label(record: Record) -> str:
    label = record.fields.get("label")
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise PEFTError(f"{record.where}: field 'label' is {label!r}; expected a text or a whole number")
    return str(label)
