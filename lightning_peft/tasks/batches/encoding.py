"""Examples as tokens with labels, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from lightning_peft.adapters.virtual_tokens.infix import IGNORED
from lightning_peft.errors import PEFTError
from lightning_peft.tasks.batches.chat import ChatTemplate, plain_pieces, plain_prompt
from lightning_peft.tasks.batches.layouts import Conversation


class Example(NamedTuple):
    """An example as the model sees it.

    Attributes:
        ids: The tokens.
        labels: The same tokens where they are learned, `IGNORED` elsewhere; the first token has none, since nothing
            before it could predict it.
        prompt_ids: The tokens before the last answer.
        answer: What a generated answer is compared with: the last one, or its result alone.
    """

    ids: list[int]
    labels: list[int]
    prompt_ids: list[int]
    answer: str


@dataclass(frozen=True)
class Encoder:
    """Turns conversations into tokens.

    Attributes:
        tokenizer: The model's.
        template: How conversations are written; without one, a prompt and its answer are parted by white space.
        max_length: Tokens after which an example is cut off, and a plain text goes on in another one.
        loss_on: Whether the answers are learned, or every token.
    """

    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate | None
    max_length: int
    loss_on: Literal["answers", "all"] = "answers"

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            PEFTError: One is out of its range.
        """
        if self.loss_on not in ("answers", "all"):
            raise PEFTError(f"loss_on={self.loss_on!r} was given; expected 'answers' or 'all'")
        if self.max_length < 2:
            raise PEFTError(
                f"max_length={self.max_length} was given; expected at least 2 tokens: one to learn behind one"
            )

    def prompt(self, conversation: Conversation) -> list[int]:
        """Return the tokens before the last answer, or of a text as a whole."""
        if conversation.text is not None:
            return self._ids(conversation.text, special=True)
        if self.template is None:
            return self._ids(plain_prompt(conversation), special=True)
        return self._ids(self.template.prompt(conversation))

    def examples(self, conversation: Conversation) -> list[Example]:
        """Return a conversation as one example, or a text as as many as it takes.

        Pieces are tokenised apart, so that training sees a prompt as generation does. Nothing is cut off yet.

        Raises:
            PEFTError: It cannot be written, or is cut off before its first answer.
        """
        templated = self.template is not None and conversation.text is None
        if self.template is not None and conversation.text is None:
            pieces = self.template.pieces(conversation)
        else:
            pieces = plain_pieces(conversation, self.tokenizer.eos_token)
        ids, labels, last = list[int](), list[int](), 0
        for piece in pieces:
            # A template writes the token that begins a text itself.
            tokens = self._ids(piece.text, special=not templated and not ids)
            last = len(ids) if piece.answer else last
            ids += tokens
            labels += tokens if piece.answer or self.loss_on == "all" else [IGNORED] * len(tokens)
        if conversation.text is not None:
            starts = range(0, len(ids), self.max_length)
            rows = [ids[start : start + self.max_length] for start in starts]
            return [Example(row, [IGNORED, *row[1:]], [], "") for row in rows if len(row) > 1]
        labels[:1] = [IGNORED]
        if all(label == IGNORED for label in labels[: self.max_length]):
            raise PEFTError(
                f"{conversation.where}: the prompt alone has {labels.count(IGNORED)} tokens; expected fewer than "
                f"max_length={self.max_length}: raise max_length or shorten the prompt"
            )
        return [Example(ids, labels, ids[:last], conversation.expected)]

    def _ids(self, text: str, special: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])


def cut(examples: Sequence[Example], max_length: int) -> tuple[list[Example], int, int]:
    """Cut examples off.

    Returns:
        The examples, how many of them were longer, and how many learned tokens that cost.
    """
    longer = [example for example in examples if len(example.ids) > max_length]
    lost = sum(label != IGNORED for example in longer for label in example.labels[max_length:])
    shorter = [e._replace(ids=e.ids[:max_length], labels=e.labels[:max_length]) for e in examples]
    return shorter, len(longer), lost


def collate(examples: Sequence[Example], pad_token_id: int) -> dict[str, Any]:
    """Pad examples on the left to the longest one.

    Returns:
        `input_ids`, `attention_mask` and `labels`, (batch, time); `prompts`, a list of tokens for each, and `answers`.
    """
    width = max(len(example.ids) for example in examples)

    def padded(rows: Sequence[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([[value] * (width - len(row)) + row for row in rows])

    return {
        "input_ids": padded([example.ids for example in examples], pad_token_id),
        "attention_mask": padded([[1] * len(example.ids) for example in examples], 0),
        "labels": padded([example.labels for example in examples], IGNORED),
        "prompts": [example.prompt_ids for example in examples],
        "answers": [example.answer for example in examples],
    }
