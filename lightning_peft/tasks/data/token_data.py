"""Words with a label each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning_peft.adapters.virtual_tokens.infix import IGNORED
from lightning_peft.errors import PEFTError
from lightning_peft.tasks.data.file_data import FileData
from lightning_peft.tasks.examples.records import Record

WORDS = ("tokens", "words")
LABELS = ("labels", "tags", "ner_tags", "pos_tags")


class TokenData(FileData):
    """Words and labels: two lists of the same length in each record, `tokens` (or `words`) and `labels` (or `tags`).

    Classes are the labels of the training file in sorted order; give their number to the module as `num_labels`. A word
    that the tokenizer divides is judged by its first part.

    Args:
        train_file: Training examples: JSON lines, a JSON array (`.json`), `.parquet`, or the directory of a saved
            Hugging Face dataset. Read at every stage, for its labels.
        val_file: Validation examples; without it there is no validation.
        test_file: Test examples.
        predict_file: Words to label; labels are not read.
        tokenizer: Where the tokenizer comes from, as the model's argument `model`. By default it is the
            `tokenizer` of the module that the trainer runs.
        batch_size: Examples per batch and process.
        max_length: Tokens after which an example is cut off.
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
        """Find the classes in the training file.

        Raises:
            PEFTError: They are not as many as the module has, or a record is not of this layout.
        """
        self.labels = self.classes(label for record in self.read("train") for label in _labels(record, _words(record)))

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
        """Words in the file's order."""
        return self._loader("predict")

    def readable(self, predictions: list[Any]) -> list[Any]:
        """Return the labels that numbers of classes stand for, of each word."""
        return [[self.labels[number] for number in numbers] for numbers in predictions]

    def _loader(self, split: str, shuffle: bool = False) -> DataLoader[Any]:
        tokenizer = self.load_tokenizer()
        examples = [self._example(record, split) for record in self.read(split)]

        def collate(rows: Sequence[tuple[list[str], list[int]]]) -> dict[str, Any]:
            encoded = tokenizer(
                [words for words, _ in rows],
                is_split_into_words=True,
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            )
            starts = torch.zeros_like(encoded["input_ids"], dtype=torch.bool)
            labels = torch.full_like(encoded["input_ids"], IGNORED)
            for i, (_, numbers) in enumerate(rows):
                of_token = encoded.word_ids(i)
                for place, word in enumerate(of_token):
                    if word is not None and word not in of_token[:place]:
                        starts[i, place] = True
                        labels[i, place] = numbers[word] if numbers else IGNORED
            return {**encoded, "labels": labels, "starts": starts}

        return self.loader(examples, collate, shuffle)

    def _example(self, record: Record, split: str) -> tuple[list[str], list[int]]:
        words = _words(record)
        if split == "predict":
            return words, []
        return words, [self.number(label, self.labels, record) for label in _labels(record, words)]


def _words(record: Record) -> list[str]:
    name = next((name for name in WORDS if name in record.fields), WORDS[0])
    words = record.fields.get(name)
    if not isinstance(words, list) or not words or not all(isinstance(word, str) and word.strip() for word in words):
        raise PEFTError(f"{record.where}: field {name!r} is {words!r}; expected a list of words, and no empty one")
    return words


def _labels(record: Record, words: Sequence[str]) -> list[str]:
    name = next((name for name in LABELS if name in record.fields), LABELS[0])
    labels = record.fields.get(name)
    if not isinstance(labels, list) or not all(type(label) in (str, int) and label != "" for label in labels):
        raise PEFTError(f"{record.where}: field {name!r} is {labels!r}; expected a list of texts or whole numbers")
    if len(labels) != len(words):
        raise PEFTError(f"{record.where}: {len(words)} words and {len(labels)} labels; expected a label for each word")
    return [str(label) for label in labels]
