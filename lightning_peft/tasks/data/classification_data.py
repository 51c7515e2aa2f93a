"""Texts with labels from data files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning_peft.errors import PEFTError
from lightning_peft.tasks.data.file_data import FileData
from lightning_peft.tasks.examples.records import Record


class ClassificationData(FileData):
    """Texts and labels: fields `text` and `label` of the records of a file.

    Classes are the labels of the training file in sorted order; give their number to the module as `num_labels`.

    Args:
        train_file: Training examples: JSON lines, a JSON array (`.json`), `.csv` with a header line, `.parquet`, or the
            directory of a saved Hugging Face dataset. Read at every stage, for its labels.
        val_file: Validation examples; without it there is no validation.
        test_file: Test examples.
        predict_file: Texts to classify; labels are not read.
        tokenizer: Where the tokenizer comes from, as the model's argument `model`. By default it is the
            `tokenizer` of the module that the trainer runs.
        batch_size: Examples per batch and process.
        max_length: Tokens after which a text is cut off.
        num_workers: Processes that put batches together; 0 does it in the training process.
    """

    def __init__(
        self,
        train_file: str,
        val_file: str | None = None,
        test_file: str | None = None,
        predict_file: str | None = None,
        tokenizer: str | None = None,
        batch_size: int = 16,
        max_length: int = 256,
        num_workers: int = 0,
    ) -> None:
        super().__init__(train_file, val_file, test_file, predict_file, tokenizer, batch_size, num_workers)
        self.max_length = max_length
        self.labels: list[str] = []

    def setup(self, stage: str) -> None:
        """Find the classes in the training file."""
        self.labels = self.classes(_label(record) for record in self.read("train"))

    def train_dataloader(self) -> DataLoader[Any]:
        """Training examples, shuffled."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Validation examples in the file's order; an empty list if there is no file."""
        return self._loader("val") if self.files["val"] else []

    def test_dataloader(self) -> DataLoader[Any]:
        """Test examples in the file's order."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Texts in the file's order."""
        return self._loader("predict")

    def readable(self, predictions: list[Any]) -> list[Any]:
        """Return the labels that numbers of classes stand for."""
        return [self.labels[number] for number in predictions]

    def _loader(self, split: str, shuffle: bool = False) -> DataLoader[Any]:
        tokenizer = self.load_tokenizer()
        examples = [
            (record.text("text"), 0 if split == "predict" else self.number(_label(record), self.labels, record))
            for record in self.read(split)
        ]

        def collate(rows: Sequence[tuple[str, int]]) -> dict[str, torch.Tensor]:
            texts = [text for text, _ in rows]
            batch = tokenizer(texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
            if split != "predict":
                batch["labels"] = torch.tensor([number for _, number in rows])
            return dict(batch)

        return self.loader(examples, collate, shuffle)


def _label(record: Record) -> str:
    label = record.fields.get("label")
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise PEFTError(f"{record.where}: field 'label' is {label!r}; expected a text or a whole number")
    return str(label)
