"""Texts and what is to be made of them, for encoder-decoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lightning_peft.adapters.virtual_tokens.infix import IGNORED
from lightning_peft.errors import PEFTError
from lightning_peft.tasks.batches.chat import plain_answer, plain_prompt
from lightning_peft.tasks.batches.encoding import Example
from lightning_peft.tasks.batches.layouts import conversation
from lightning_peft.tasks.data.file_data import FileData


class Seq2SeqData(FileData):
    """Texts with answers: summaries, translations.

    A record has `source` and `target`, `document` or `dialogue` and `summary`, or is of another layout of
    `InstructionData` with one prompt and one answer.

    Args:
        train_file: Training examples, for `fit`: JSON lines, a JSON array (`.json`), `.csv` with a header line,
            `.parquet`, or the directory of a saved Hugging Face dataset.
        val_file: Validation examples, for `fit` (without it there is no validation) and `validate`.
        test_file: Test examples, for `test`.
        predict_file: Texts, for `predict`; answers are not read.
        tokenizer: Where the tokenizer comes from, as the model's argument `model`. By default it is the
            `tokenizer` of the module that the trainer runs.
        prefix: Stands before every text, such as T5's `"summarize: "`.
        batch_size: Examples per batch and process.
        max_length: Tokens after which a text is cut off.
        max_answer_length: Tokens after which an answer is cut off.
        num_workers: Processes that put batches together; 0 does it in the training process.
        train_examples: Learn from so many records, the first of the training file; all by default.
    """

    def __init__(
        self,
        train_file: str | None = None,
        val_file: str | None = None,
        test_file: str | None = None,
        predict_file: str | None = None,
        tokenizer: str | None = None,
        prefix: str = "",
        batch_size: int = 8,
        max_length: int = 512,
        max_answer_length: int = 128,
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
        self.prefix = prefix
        self.max_length = max_length
        self.max_answer_length = max_answer_length
        self.examples: dict[str, list[Example]] = {}

    def setup(self, stage: str) -> None:
        """Read and tokenise the files that a stage needs."""
        for split in self.splits(stage):
            if split not in self.examples:
                self.examples[split] = self._encode(split, self.load_tokenizer())

    def batches(self, split: str) -> DataLoader[Any]:
        """Return a loader of what `setup` has read of a file."""
        return self.loader(self.examples[split], self._collate, split)

    def _encode(self, split: str, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
        self.pad_token_id: int = tokenizer.pad_token_id
        if min(self.max_length, self.max_answer_length) < 1:
            raise PEFTError(
                f"max_length={self.max_length} and max_answer_length={self.max_answer_length} were given; expected "
                "numbers of tokens"
            )
        answered, examples, cut = split != "predict", [], {"texts": 0, "answers": 0}
        for record in self.read(split):
            turns = conversation(record, answered=answered)
            answer = plain_answer(turns) if answered else ""
            if split == "test":
                self.check_judged(record.where, turns.expected)
            ids = list(tokenizer(self.prefix + plain_prompt(turns))["input_ids"])
            labels = list(tokenizer(text_target=answer)["input_ids"]) if answered else []
            cut["texts"] += len(ids) > self.max_length
            cut["answers"] += len(labels) > self.max_answer_length
            ids = ids[: self.max_length]
            examples.append(Example(ids, labels[: self.max_answer_length], ids, turns.expected))
        for what, limit in (("texts", "max_length"), ("answers", "max_answer_length")):
            if cut[what]:
                rank_zero_warn(
                    f"{cut[what]} of {len(examples)} {what} in {self.files[split]} are cut off at "
                    f"{limit}={getattr(self, limit)}"
                )
        return examples

    def _collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        def padded(rows: list[list[int]], value: int) -> torch.Tensor:
            width = max(map(len, rows))
            return torch.tensor([row + [value] * (width - len(row)) for row in rows])

        return {
            "input_ids": padded([e.ids for e in examples], self.pad_token_id),
            "attention_mask": padded([[1] * len(e.ids) for e in examples], 0),
            "labels": padded([e.labels for e in examples], IGNORED),
            "prompts": [e.prompt_ids for e in examples],
            "answers": [e.answer for e in examples],
        }
