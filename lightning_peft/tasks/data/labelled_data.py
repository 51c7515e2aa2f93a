"""What the DataModules of classifiers share: the classes of the training file, and the length of a text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from lightning_peft.errors import PEFTError
from lightning_peft.tasks.batches.records import Record
from lightning_peft.tasks.data.file_data import FileData


class LabelledData(FileData):
    """Texts with labels.

    Classes are the labels of the training file in sorted order; give their number to the module as `num_labels`.

    Args:
        train_file: Training examples: JSON lines, a JSON array (`.json`), `.csv` with a header line, `.parquet`, or the
            directory of a saved Hugging Face dataset. Read at every stage, for its labels.
        val_file: Validation examples; without it there is no validation.
        test_file: Test examples.
        predict_file: Texts to label; labels are not read.
        tokenizer: Where the tokenizer comes from, as the model's argument `model`. By default it is the
            `tokenizer` of the module that the trainer runs.
        batch_size: Examples per batch and process.
        max_length: Tokens after which a text is cut off.
        num_workers: Processes that put batches together; 0 does it in the training process.
        train_examples: Learn from so many records, the first of the training file; all by default.

    Raises:
        PEFTError: `max_length` has no room for a token.
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
        train_examples: int | None = None,
    ) -> None:
        super().__init__(
            train_file,
            val_file,
            test_file,
            predict_file,
            tokenizer,
            batch_size,
            num_workers,
            train_examples=train_examples,
        )
        if max_length < 1:
            raise PEFTError(f"max_length={max_length} was given; expected at least one token")
        self.max_length = max_length
        self.labels: list[str] = []

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer, which pads behind texts.

        An encoder counts positions from the first column: padding before a text would move it, and its scores would
        depend on the texts beside it.
        """
        tokenizer = super().load_tokenizer()
        tokenizer.padding_side = "right"
        return tokenizer

    def find_classes(self, labels: Iterable[str]) -> None:
        """Note the classes of the training file.

        Args:
            labels: All that stand in it.

        Raises:
            PEFTError: They are not as many as the module that the trainer runs was given.
        """
        found = sorted(set(labels))
        expected = getattr(getattr(self.module, "hparams", None), "num_labels", len(found))
        if expected != len(found):
            raise PEFTError(
                f"num_labels={expected} was given, but {self.files['train']} has {len(found)} labels: "
                f"{', '.join(found[:10])}. Give num_labels={len(found)}."
            )
        self.labels = found

    def number(self, label: str, record: Record) -> int:
        """Return the number of a label.

        Raises:
            PEFTError: The training file has no such label.
        """
        if label not in self.labels:
            raise PEFTError(
                f"{record.where}: label {label!r} does not occur in {self.files['train']}; its labels are "
                f"{', '.join(self.labels[:10])}"
            )
        return self.labels.index(label)

    def tell_of_cuts(self, split: str, encoded: Any) -> None:
        """Warn of texts that are cut off.

        Args:
            split: Of which file.
            encoded: What the tokenizer makes of its texts, with nothing cut off.
        """
        longer = sum(len(ids) > self.max_length for ids in encoded["input_ids"])
        if longer:
            rank_zero_warn(
                f"{longer} of {len(encoded['input_ids'])} texts in {self.files[split]} are cut off at "
                f"max_length={self.max_length}"
            )
