"""What the DataModules share: a file for each stage, the module's tokenizer, loaders."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lightning_peft.errors import PEFTError
from lightning_peft.tasks.batches.published import as_published
from lightning_peft.tasks.batches.records import Record, read_records
from lightning_peft.tasks.pretrained import load_tokenizer


class FileData(LightningDataModule):
    """Examples from files.

    Args:
        train_file: Training examples, for `fit`.
        val_file: Validation examples, for `fit` (without it there is no validation) and `validate`.
        test_file: Test examples, for `test`.
        predict_file: Examples without answers, for `predict`.
        tokenizer: Where the tokenizer comes from, as the model's argument `model`. By default it is the
            `tokenizer` of the module that the trainer runs.
        batch_size: Examples per batch and process.
        num_workers: Processes that put batches together; 0 does it in the training process.
        cache_dir: Where dequantised GGUF models are kept. The user's cache folder by default.
        train_examples: Learn from so many records, the first of the training file; all by default.
    """

    def __init__(
        self,
        train_file: str | None = None,
        val_file: str | None = None,
        test_file: str | None = None,
        predict_file: str | None = None,
        tokenizer: str | None = None,
        batch_size: int = 8,
        num_workers: int = 0,
        cache_dir: str | None = None,
        train_examples: int | None = None,
    ) -> None:
        super().__init__()
        if train_examples is not None and train_examples < 1:
            raise PEFTError(f"train_examples={train_examples} was given; expected at least one")
        self.files = {"train": train_file, "val": val_file, "test": test_file, "predict": predict_file}
        self.tokenizer_source = tokenizer
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.cache_dir = cache_dir
        self.train_examples = train_examples

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has, such as that of a worker process that was spawned: no trainer."""
        return {**vars(self), "trainer": None}

    @abstractmethod
    def batches(self, split: str) -> DataLoader[Any]:
        """Return a loader of the examples of a file, `train`, `val`, `test` or `predict`."""

    def train_dataloader(self) -> DataLoader[Any]:
        """Training examples, shuffled."""
        return self.batches("train")

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Validation examples in the file's order; an empty list if there is no file."""
        return self.batches("val") if self.files["val"] else []

    def test_dataloader(self) -> DataLoader[Any]:
        """Test examples in the file's order."""
        return self.batches("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """What is to be predicted, in the file's order."""
        return self.batches("predict")

    def splits(self, stage: str) -> list[str]:
        """Return which files a stage reads: validation examples are read in `fit` if there are any."""
        splits = {"fit": ["train"], "validate": ["val"], "test": ["test"], "predict": ["predict"]}[stage]
        return [*splits, "val"] if stage == "fit" and self.files["val"] else splits

    def read(self, split: str) -> list[Record]:
        """Return the records of a file.

        Raises:
            PEFTError: It was not given, cannot be read, or has fewer records than are to be learned from.
        """
        path = self.files[split]
        if path is None:
            raise PEFTError(f"{split}_file of {type(self).__name__} is missing; give the path of a data file")
        records = as_published(read_records(path, f"{split}_file"), path, answered=split != "predict")
        return self._first(records, path) if split == "train" else records

    def _first(self, records: list[Record], path: str) -> list[Record]:
        if self.train_examples is not None and self.train_examples > len(records):
            raise PEFTError(f"train_examples={self.train_examples} was given, but {path} has {len(records)} records")
        return records[: self.train_examples]

    def check_judged(self, where: str, expected: str) -> None:
        """Check that the module's metrics of generated answers can judge by an expected answer.

        Raises:
            PEFTError: One cannot: the expected answer holds nothing that it looks for.
        """
        for name, metric in dict(getattr(self.module, "text_metrics", {})).items():
            if problem := getattr(metric, "unfit", lambda expected: None)(expected):
                raise PEFTError(f"{where}: the metric {name} was asked for, and the answer is {expected!r}; {problem}")

    def predicted(self, predictions: Sequence[Any]) -> list[dict[str, Any]]:
        """Return what is written of predictions: the fields of their records, and ``prediction``.

        Args:
            predictions: One for each record of the file, in its order, or for those that come first.
        """
        records = self.read("predict")[: len(predictions)]
        values = self.readable(list(predictions))
        return [{**record.fields, "prediction": value} for record, value in zip(records, values, strict=True)]

    def readable(self, predictions: list[Any]) -> list[Any]:
        """Return predictions as users read them."""
        return predictions

    @property
    def module(self) -> Any:
        """The module that the trainer runs, if there is a trainer."""
        return self.trainer and self.trainer.lightning_module

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer that was given, or the module's.

        Raises:
            PEFTError: There is neither.
        """
        if self.tokenizer_source is not None:
            return load_tokenizer(self.tokenizer_source, self.cache_dir)
        tokenizer: PreTrainedTokenizerBase | None = getattr(self.module, "tokenizer", None)
        if tokenizer is None:
            raise PEFTError(f"{type(self).__name__} found no tokenizer on the trainer's module; give tokenizer=MODEL")
        return tokenizer

    def loader(self, rows: Sequence[Any], collate: Callable[[Any], Any], split: str) -> DataLoader[Any]:
        """Return a loader over examples; those to train on are shuffled."""
        return DataLoader(rows, shuffle=split == "train", **self.options(collate))  # type: ignore[arg-type]

    def options(self, collate: Callable[[Any], Any]) -> dict[str, Any]:
        """Return what loaders are made with."""
        return {"batch_size": self.batch_size, "num_workers": self.num_workers, "collate_fn": collate}
