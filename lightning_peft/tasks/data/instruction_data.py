"""Examples for a language model from data files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lightning_peft.adapters.virtual_tokens.infix import IGNORED
from lightning_peft.errors import PEFTError
from lightning_peft.tasks.batches.chat import chat_template
from lightning_peft.tasks.batches.encoding import Encoder, Example, collate, cut
from lightning_peft.tasks.batches.layouts import Conversation, conversation
from lightning_peft.tasks.batches.packing import collate_packed, pack
from lightning_peft.tasks.batches.resumable import ResumableLoader
from lightning_peft.tasks.batches.sampling import LengthGroupedSampler
from lightning_peft.tasks.data.file_data import FileData

SHOWN = 1500
"""Characters of the example that is shown when training begins."""


class InstructionData(FileData):
    """Questions and answers, conversations or plain texts, as they are found in files.

    Files are JSON lines, a JSON array (`.json`), `.csv` with a header line, `.parquet`, or directories of saved Hugging
    Face datasets. The fields of a record tell its layout:

    * `messages`: turns with `role` and `content`, also `tool_calls`; `tools` beside it
    * `conversations`: ShareGPT's turns with `from` and `value`
    * `prompt` and `completion` (or `answer`), texts or turns
    * `question` and `answer`
    * `instruction`, `input` (may be missing or empty) and `output`, with `system` if there is one; beside an `answer`,
      which is the result alone, `output` is learned and `answer` judged by
    * `document` or `dialogue` and `summary`; `source` and `target`
    * the published files of WikiSQL, GSM8K, SVAMP, SAMSum and DialogSum
    * `text`: learned as a whole; what is longer than `max_length` goes on in another example

    A model whose tokenizer has a chat template sees every layout but `text` written by it. The first example is shown
    when training begins. Training batches hold examples of like length, in an order that depends on `seed` and the
    epoch alone.

    Args:
        train_file: Training examples, for `fit`.
        val_file: Validation examples, for `fit` (without it there is no validation) and `validate`.
        test_file: Test examples, for `test`.
        predict_file: Prompts, for `predict`; an answer at the end of a record is not read.
        tokenizer: Where the tokenizer comes from, as the model's argument `model`. By default it is the
            `tokenizer` of the module that the trainer runs.
        batch_size: Examples per batch and process, or rows of them with `packing`.
        max_length: Tokens of an example; a longer answer is cut off, a longer prompt refused.
        chat_template: Whether the tokenizer's chat template is used, if it has one; or the path of a Jinja file to use
            instead. Without a template a prompt is used as it is, with white space before its answer.
        loss_on: `answers` learns what the assistant says, `all` every token.
        packing: Put several training examples into a row of `max_length` tokens, without attention across them.
        seed: Of the order of training examples.
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
        max_length: int = 512,
        chat_template: bool | str = True,
        loss_on: Literal["answers", "all"] = "answers",
        packing: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | None = None,
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
            cache_dir,
            train_examples=train_examples,
        )
        self.max_length = max_length
        self.chat_template = chat_template
        self.loss_on = loss_on
        self.packing = packing
        self.seed = seed
        self.examples: dict[str, list[Example]] = {}
        self.prompts: list[list[int]] = []

    def setup(self, stage: str) -> None:
        """Read and tokenise the files that a stage needs."""
        encoder = self._encoder()
        if stage == "predict":
            self.prompts = [encoder.prompt(turns) for turns in self._read("predict", answered=False)]
            return
        for split in self.splits(stage):
            if split not in self.examples:
                self.examples[split] = self._encode(split, encoder)
        if stage == "fit":
            rank_zero_info(_shown(self.examples["train"], encoder.tokenizer))

    def train_dataloader(self) -> DataLoader[Any]:
        """Training examples, grouped by length and shuffled; resumed within an epoch, those that are left of it."""
        examples = self.examples["train"]
        rows: Sequence[Any] = examples
        together: Callable[[Any], dict[str, Any]] = self._collate
        lengths = [len(example.ids) for example in examples]
        if self.packing:
            packed = pack(lengths, self.max_length)
            rank_zero_info(f"packing: {len(examples)} examples in {len(packed)} rows of {self.max_length} tokens")
            rows = [[examples[i] for i in row] for row in packed]
            lengths = [sum(lengths[i] for i in row) for row in packed]
            together = self._collate_packed
        sampler = LengthGroupedSampler(
            lengths,
            batch_size=self.batch_size,
            seed=self.seed,
            **(self._trainer().distributed_sampler_kwargs or {}),
        )
        loader = ResumableLoader(rows, sampler=sampler, **self.options(together))  # type: ignore[arg-type]
        loader.trainer = self._trainer()
        return loader

    def batches(self, split: str) -> DataLoader[Any]:
        """Return a loader of examples, or of prompts to predict from, in the file's order."""
        if split == "predict":
            return self.loader(self.prompts, _prompts, split)
        return self.loader(self.examples[split], self._collate, split)

    def _trainer(self) -> Any:
        if self.trainer is None:
            raise PEFTError("InstructionData has no trainer; pass it to one: trainer.fit(module, datamodule=data)")
        return self.trainer

    def _read(self, split: str, answered: bool = True) -> list[Conversation]:
        return [conversation(record, answered=answered) for record in self.read(split)]

    def _encoder(self) -> Encoder:
        tokenizer = self.load_tokenizer()
        self.pad_token_id: int = tokenizer.pad_token_id
        return Encoder(tokenizer, chat_template(tokenizer, self.chat_template), self.max_length, self.loss_on)

    def _encode(self, split: str, encoder: Encoder) -> list[Example]:
        read = self._read(split)
        for turns in read if split == "test" else []:
            self.check_judged(turns.where, turns.expected)
        whole = [example for turns in read for example in encoder.examples(turns)]
        examples, longer, lost = cut(whole, self.max_length)
        if longer:
            learned = sum(label != IGNORED for example in whole for label in example.labels)
            rank_zero_warn(
                f"{longer} of {len(whole)} examples in {self.files[split]} are cut off at "
                f"max_length={self.max_length}: {lost:,} of {learned:,} tokens to learn ({lost / learned:.1%}) are lost"
            )
        return examples

    def _collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        return collate(examples, self.pad_token_id)

    def _collate_packed(self, rows: Sequence[Sequence[Example]]) -> dict[str, Any]:
        return collate_packed(rows, self.pad_token_id)


def _prompts(prompts: list[list[int]]) -> dict[str, list[list[int]]]:
    return {"prompts": prompts}


def _shown(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> str:
    """The first example as the model sees it, with what is learned in brackets."""
    ids, labels = examples[0].ids, examples[0].labels
    text, start = "", 0
    for end in range(1, len(ids) + 1):
        learned = labels[start] != IGNORED
        if end == len(ids) or (labels[end] != IGNORED) != learned:
            piece = str(tokenizer.decode(ids[start:end]))
            text += f"[[{piece}]]" if learned else piece
            start = end
    shown = text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."
    head = f"The first of {len(examples)} training examples as the model sees it; what is in [[ ]] is learned:"
    return f"{head}\n{shown}\n"
