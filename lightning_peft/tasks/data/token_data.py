"""Words with a label each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning_peft.adapters.virtual_tokens.infix import IGNORED
from lightning_peft.errors import PEFTError
from lightning_peft.tasks.batches.records import Record
from lightning_peft.tasks.data.labelled_data import LabelledData

WORDS = ("tokens", "words")
LABELS = ("labels", "tags", "ner_tags", "pos_tags")


class TokenData(LabelledData):
    """Words and labels: two lists of the same length in each record, `tokens` (or `words`) and `labels` (or `tags`).

    A word that the tokenizer divides is judged by its first part. See `LabelledData` for the arguments.
    """

    def setup(self, stage: str) -> None:
        """Find the classes in the training file."""
        self.find_classes(label for record in self.read("train") for label in _labels(record, _words(record)))

    def predicted(self, predictions: Sequence[Any]) -> list[dict[str, Any]]:
        """Return records with a label for each word, `None` for those behind `max_length`."""
        rows = super().predicted(predictions)
        for row, record in zip(rows, self.read("predict"), strict=False):
            row["prediction"] += [None] * (len(_words(record)) - len(row["prediction"]))
        return rows

    def readable(self, predictions: list[Any]) -> list[Any]:
        """Return the labels that numbers of classes stand for, of each word."""
        return [[self.labels[number] for number in numbers] for numbers in predictions]

    def batches(self, split: str) -> DataLoader[Any]:
        """Return a loader of words with the numbers of their classes, and with the places of their first tokens."""
        tokenizer = self.load_tokenizer()
        examples = [self._example(record, split) for record in self.read(split)]
        self.tell_of_cuts(split, tokenizer([words for words, _ in examples], is_split_into_words=True))

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
                for place, (before, word) in enumerate(pairwise([None, *of_token])):
                    if word is not None and word != before:
                        starts[i, place] = True
                        labels[i, place] = numbers[word] if numbers else IGNORED
            return {**encoded, "labels": labels, "starts": starts}

        return self.loader(examples, collate, split)

    def _example(self, record: Record, split: str) -> tuple[list[str], list[int]]:
        words = _words(record)
        if split == "predict":
            return words, []
        return words, [self.number(label, record) for label in _labels(record, words)]


def _words(record: Record) -> list[str]:
    name = next((name for name in WORDS if name in record.fields), None)
    if name is None:
        raise PEFTError(f"{record.where}: expected words in {' or '.join(WORDS)}. Found {sorted(record.fields)}")
    words = record.fields[name]
    if not isinstance(words, list) or not words or not all(isinstance(word, str) and word.strip() for word in words):
        raise PEFTError(f"{record.where}: field {name!r} is {words!r}; expected a list of words, and no empty one")
    return words


def _labels(record: Record, words: Sequence[str]) -> list[str]:
    name = next((name for name in LABELS if name in record.fields), None)
    if name is None:
        raise PEFTError(f"{record.where}: expected labels in {' or '.join(LABELS)}. Found {sorted(record.fields)}")
    labels = record.fields[name]
    if not isinstance(labels, list) or not all(type(label) in (str, int) and label != "" for label in labels):
        raise PEFTError(f"{record.where}: field {name!r} is {labels!r}; expected a list of texts or whole numbers")
    if len(labels) != len(words):
        raise PEFTError(f"{record.where}: {len(words)} words and {len(labels)} labels; expected a label for each word")
    return [str(label) for label in labels]
