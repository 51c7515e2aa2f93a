"""Texts with labels from JSONL or CSV files."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from lightning_peft.errors import PEFTError
from lightning_peft.tasks.pretrained import load_tokenizer
from lightning_peft.tasks.records import Record, read_records


class ClassificationData(LightningDataModule):
    """Texts and labels: fields `text` and `label` of a `.csv` file with a header, or of one JSON object per line.

    Classes are the labels of the training file in sorted order; give their number to the module as `num_labels`.

    Args:
        train_file: Training examples. Read at every stage, for its labels.
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
        super().__init__()
        self.files = {"train": train_file, "val": val_file, "test": test_file, "predict": predict_file}
        self.tokenizer_source = tokenizer
        self.batch_size = batch_size
        self.max_length = max_length
        self.num_workers = num_workers
        self.labels: list[str] = []

    def setup(self, stage: str) -> None:
        """Find the classes in the training file."""
        self.labels = sorted({_label(record) for record in self._read("train")})
        expected = getattr(getattr(self._module, "hparams", None), "num_labels", len(self.labels))
        if expected != len(self.labels):
            raise PEFTError(
                f"num_labels={expected} was given, but {self.files['train']} has {len(self.labels)} labels: "
                f"{', '.join(self.labels[:10])}. Give num_labels={len(self.labels)}."
            )

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

    @property
    def _module(self) -> Any:
        return self.trainer and self.trainer.lightning_module

    def _read(self, split: str) -> list[Record]:
        path = self.files[split]
        if path is None:
            raise PEFTError(f"{split}_file of ClassificationData is missing; give the path of a JSONL or CSV file")
        return read_records(path, f"{split}_file")

    def _loader(self, split: str, shuffle: bool = False) -> DataLoader[Any]:
        tokenizer = load_tokenizer(self.tokenizer_source) if self.tokenizer_source else self._module.tokenizer
        numbers = {label: number for number, label in enumerate(self.labels)}

        def collate(records: list[Record]) -> dict[str, torch.Tensor]:
            texts = [record.text("text") for record in records]
            batch = tokenizer(texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
            if split != "predict":
                batch["labels"] = torch.tensor([numbers[_label(record)] for record in records])
            return dict(batch)

        records = self._read(split)
        for record in records if split != "predict" else ():
            if _label(record) not in numbers:
                raise PEFTError(
                    f"{record.where}: label {_label(record)!r} does not occur in {self.files['train']}; its labels are "
                    f"{', '.join(self.labels[:10])}"
                )
        return DataLoader(
            records,  # type: ignore[arg-type]
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            collate_fn=collate,
        )


def _label(record: Record) -> str:
    label = record.fields.get("label")
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise PEFTError(f"{record.where}: field 'label' is {label!r}; expected a text or a whole number")
    return str(label)
