"""Prompts with two answers, of which one is the better."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader

from lightning_peft.errors import PEFTError
from lightning_peft.tasks.batches.chat import chat_template
from lightning_peft.tasks.batches.encoding import Encoder, Example, collate, cut
from lightning_peft.tasks.batches.layouts import Conversation, conversation
from lightning_peft.tasks.batches.records import Record
from lightning_peft.tasks.data.file_data import FileData


class Pair(NamedTuple):
    """The better and the worse answer to a prompt, each behind it."""

    chosen: Example
    rejected: Example


class PreferenceData(FileData):
    """Pairs of answers: `prompt`, `chosen` and `rejected`, texts or turns.

    Without `prompt`, `chosen` and `rejected` are whole conversations that are the same but for the last turn.

    Args:
        train_file: Training pairs, for `fit`: JSON lines, a JSON array (`.json`), `.csv` with a header line,
            `.parquet`, or the directory of a saved Hugging Face dataset.
        val_file: Validation pairs, for `fit` (without it there is no validation) and `validate`.
        test_file: Test pairs, for `test`.
        tokenizer: Where the tokenizer comes from, as the model's argument `model`. By default it is the
            `tokenizer` of the module that the trainer runs.
        batch_size: Pairs per batch and process.
        max_length: Tokens of prompt and answer; a longer answer is cut off, a longer prompt refused.
        chat_template: Whether the tokenizer's chat template is used, if it has one; or the path of a Jinja file to use
            instead. Without a template a prompt is used as it is, with white space before its answer.
        num_workers: Processes that put batches together; 0 does it in the training process.
        cache_dir: Where dequantised GGUF models are kept. The user's cache folder by default.
        train_examples: Learn from so many records, the first of the training file; all by default.
    """

    def __init__(
        self,
        train_file: str | None = None,
        val_file: str | None = None,
        test_file: str | None = None,
        tokenizer: str | None = None,
        batch_size: int = 4,
        max_length: int = 512,
        chat_template: bool | str = True,
        num_workers: int = 0,
        cache_dir: str | None = None,
        train_examples: int | None = None,
    ) -> None:
        super().__init__(
            train_file,
            val_file,
            test_file,
            None,
            tokenizer,
            batch_size,
            num_workers,
            cache_dir,
            train_examples=train_examples,
        )
        self.max_length = max_length
        self.chat_template = chat_template
        self.pairs: dict[str, list[Pair]] = {}

    def setup(self, stage: str) -> None:
        """Read and tokenise the files that a stage needs.

        Raises:
            PEFTError: There is nothing to predict of pairs, or a file is not of this layout.
        """
        if stage == "predict":
            raise PEFTError("PreferenceData has answers to compare and none to predict; give InstructionData")
        tokenizer = self.load_tokenizer()
        self.pad_token_id: int = tokenizer.pad_token_id
        encoder = Encoder(tokenizer, chat_template(tokenizer, self.chat_template), self.max_length)
        for split in self.splits(stage):
            if split not in self.pairs:
                self.pairs[split] = self._encode(split, encoder)

    def batches(self, split: str) -> DataLoader[Any]:
        """Return a loader of what `setup` has read of a file."""
        return self.loader(self.pairs[split], self._collate, split)

    def _encode(self, split: str, encoder: Encoder) -> list[Pair]:
        pairs, longer = [], 0
        for record in self.read(split):
            examples = [encoder.examples(_answered(record, answer))[0] for answer in ("chosen", "rejected")]
            (chosen, rejected), more, _ = cut(examples, self.max_length)
            if chosen.prompt_ids != rejected.prompt_ids:
                raise PEFTError(
                    f"{record.where}: 'chosen' and 'rejected' differ before the last turn; expected two answers to one "
                    "prompt"
                )
            if chosen.ids == rejected.ids:
                cause = f" within max_length={self.max_length} tokens" if more else ""
                raise PEFTError(f"{record.where}: 'chosen' and 'rejected' are the same{cause}; expected two answers")
            pairs.append(Pair(chosen, rejected))
            longer += more
        if longer:
            rank_zero_warn(
                f"{longer} of {2 * len(pairs)} answers in {self.files[split]} are cut off at "
                f"max_length={self.max_length}"
            )
        return pairs

    def _collate(self, pairs: Sequence[Pair]) -> dict[str, Any]:
        # The better answers first, then the worse: one call of the model for both.
        return collate([*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)], self.pad_token_id)


def _answered(record: Record, answer: str) -> Conversation:
    if answer not in record.fields:
        raise PEFTError(f"{record.where}: expected a field {answer!r}, found {sorted(record.fields)}")
    value = record.fields[answer]
    fields = {"tools": record.fields.get("tools"), "system": record.fields.get("system")}
    prompt = record.fields.get("prompt")
    turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    # Many files have the prompt twice: by itself, and at the head of both conversations.
    if "prompt" not in record.fields or (isinstance(value, list) and value[: len(turns)] == turns):
        fields |= {"messages": value}
    else:
        fields |= {"prompt": prompt, "completion": value}
    return conversation(Record(record.where, fields))
