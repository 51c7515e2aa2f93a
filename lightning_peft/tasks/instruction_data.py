"""Prompts and answers from JSONL files."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lightning_peft.adapters.virtual_tokens.infix import IGNORED
from lightning_peft.errors import PEFTError
from lightning_peft.tasks.pretrained import load_tokenizer
from lightning_peft.tasks.records import Record, read_records
from lightning_peft.tasks.resumable import ResumableLoader
from lightning_peft.tasks.sampling import LengthGroupedSampler


class Example(NamedTuple):
    """A prompt with its answer, as text and as tokens."""

    prompt: str
    answer: str
    prompt_ids: list[int]
    answer_ids: list[int]


def prompt_of(record: Record) -> str:
    """The prompt of a record: `prompt`, or `instruction` with `input` on a line of its own."""
    if "prompt" in record.fields:
        return record.text("prompt")
    instruction = record.text("instruction", "prompt")
    return f"{instruction}\n{record.text('input')}" if record.fields.get("input") else instruction


def encode(record: Record, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Example:
    """Tokenise one record; prompt and answer are parted by white space, and the answer ends the text.

    Prompt and answer are tokenised apart, so that training sees a prompt as generation does.
    """
    prompt, answer = prompt_of(record), record.text("answer", "output")
    parted = prompt[-1].isspace() or answer[0].isspace()
    prompt_ids = tokenizer(prompt)["input_ids"]
    if len(prompt_ids) >= max_length:
        raise PEFTError(
            f"{record.where}: the prompt alone has {len(prompt_ids)} tokens; expected fewer than max_length="
            f"{max_length}: raise max_length or shorten the prompt"
        )
    answer_ids = tokenizer(answer if parted else f" {answer}", add_special_tokens=False)["input_ids"]
    return Example(prompt, answer, prompt_ids, [*answer_ids, tokenizer.eos_token_id])


def collate(examples: list[Example], pad_token_id: int, max_length: int) -> dict[str, Any]:
    """Pad examples on the left to the longest one; what goes beyond `max_length` is cut off at the end."""
    rows = [(e.prompt_ids + e.answer_ids)[:max_length] for e in examples]
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_token_id)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for i, (row, example) in enumerate(zip(rows, examples, strict=True)):
        start = width - len(row)
        ids[i, start:] = torch.tensor(row)
        mask[i, start:] = 1
        answer_start = start + len(example.prompt_ids)
        labels[i, answer_start:] = ids[i, answer_start:]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "prompts": [example.prompt for example in examples],
        "answers": [example.answer for example in examples],
    }


class InstructionData(LightningDataModule):
    """Prompts and answers, one JSON object per line.

    A line has the fields `prompt` and `answer`, or `instruction`, `input` (may be missing or empty) and
    `output`. Prompts are used as they are. Training batches hold examples of like length, in an order that
    depends on `seed` and the epoch alone.

    Args:
        train_file: Training examples, for `fit`.
        val_file: Validation examples, for `fit` (without it there is no validation) and `validate`.
        test_file: Test examples, for `test`.
        predict_file: Prompts, for `predict`; answers are not read.
        tokenizer: Where the tokenizer comes from, as the model's argument `model`. By default it is the
            `tokenizer` of the module that the trainer runs.
        batch_size: Examples per batch and process.
        max_length: Tokens of prompt and answer together; a longer answer is cut off, a longer prompt refused.
        seed: Of the order of training examples.
        num_workers: Processes that put batches together; 0 does it in the training process.
        cache_dir: Where dequantised GGUF models are kept. The user's cache folder by default.
    """

    def __init__(
        self,
        train_file: str | None = None,
        val_file: str | None = None,
        test_file: str | None = None,
        predict_file: str | None = None,
        tokenizer: str | None = None,
        batch_size: int = 8,
        max_length: int = 512,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        self.files = {"train": train_file, "val": val_file, "test": test_file, "predict": predict_file}
        self.tokenizer_source = tokenizer
        self.batch_size = batch_size
        self.max_length = max_length
        self.seed = seed
        self.num_workers = num_workers
        self.cache_dir = cache_dir
        self.examples: dict[str, list[Example]] = {}
        self.prompts: list[str] = []

    def setup(self, stage: str) -> None:
        """Read and tokenise the files that a stage needs."""
        if stage == "predict":
            self.prompts = [prompt_of(record) for record in self._read("predict")]
            return
        splits = {"fit": ["train", "val"], "validate": ["val"], "test": ["test"]}[stage]
        for split in splits:
            if split not in self.examples and (self.files[split] is not None or split == splits[0]):
                self.examples[split] = self._encode(split)

    def train_dataloader(self) -> DataLoader[Any]:
        """Training examples, grouped by length and shuffled; resumed within an epoch, those that are left of it."""
        examples = self.examples["train"]
        sampler = LengthGroupedSampler(
            [len(example.prompt_ids) + len(example.answer_ids) for example in examples],
            batch_size=self.batch_size,
            seed=self.seed,
            **(self._trainer().distributed_sampler_kwargs or {}),
        )
        loader = ResumableLoader(self.examples["train"], sampler=sampler, **self._options())  # type: ignore[arg-type]
        loader.trainer = self._trainer()
        return loader

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Validation examples in the file's order; an empty list if there is no file."""
        return self._loader("val") if "val" in self.examples else []

    def test_dataloader(self) -> DataLoader[Any]:
        """Test examples in the file's order."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Prompts in the file's order."""
        return DataLoader(self.prompts, batch_size=self.batch_size, collate_fn=lambda prompts: {"prompts": prompts})  # type: ignore[arg-type]

    def _trainer(self) -> Any:
        if self.trainer is None:
            raise PEFTError("InstructionData has no trainer; pass it to one: trainer.fit(module, datamodule=data)")
        return self.trainer

    def _read(self, split: str) -> list[Record]:
        path = self.files[split]
        if path is None:
            raise PEFTError(f"{split}_file of InstructionData is missing; give the path of a JSONL file")
        return read_records(path, f"{split}_file")

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer_source is not None:
            return load_tokenizer(self.tokenizer_source, self.cache_dir)
        tokenizer: PreTrainedTokenizerBase | None = getattr(
            self.trainer and self.trainer.lightning_module, "tokenizer", None
        )
        if tokenizer is None:
            raise PEFTError("InstructionData found no tokenizer on the trainer's module; give tokenizer=MODEL")
        return tokenizer

    def _encode(self, split: str) -> list[Example]:
        records, tokenizer = self._read(split), self._tokenizer()
        self.pad_token_id: int = tokenizer.pad_token_id
        examples = [encode(record, tokenizer, self.max_length) for record in records]
        cut = sum(len(e.prompt_ids) + len(e.answer_ids) > self.max_length for e in examples)
        if cut:
            rank_zero_warn(
                f"{cut} of {len(examples)} answers in {self.files[split]} are cut off at max_length={self.max_length}"
            )
        return examples

    def _loader(self, split: str) -> DataLoader[Any]:
        return DataLoader(self.examples[split], **self._options())  # type: ignore[arg-type]

    def _options(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "collate_fn": lambda rows: collate(rows, self.pad_token_id, self.max_length),
        }
