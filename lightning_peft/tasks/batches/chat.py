"""A conversation as the text that a model is trained on, in pieces that are learned or only read."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lightning_peft.errors import PEFTError
from lightning_peft.tasks.batches.layouts import Conversation, Message


class Piece(NamedTuple):
    """A part of the text, and whether it is an answer."""

    text: str
    answer: bool


class ChatTemplate:
    """How a model's conversations are written: the Jinja template that comes with its tokenizer, or another.

    Args:
        tokenizer: The model's.
        template: Takes the place of the tokenizer's own.
        name: Of the template, for messages.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None = None, name: str = "") -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.name = name or "the tokenizer's chat template"

    def prompt(self, conversation: Conversation) -> str:
        """Write the turns before the last answer, up to where that answer begins.

        Raises:
            PEFTError: The template cannot write them, or leaves something out.
        """
        prompt = conversation.prompt
        written = self._render(prompt, prompt.messages, add_generation_prompt=True)
        self._refuse_left_out(prompt, written)
        return written

    def pieces(self, conversation: Conversation) -> list[Piece]:
        """Write a conversation, divided where answers begin and end.

        An answer ends with the token that ends a turn: white space behind it is read and not learned, and left out
        where nothing follows, as generation ends there as well.

        Raises:
            PEFTError: The template cannot write it, leaves something out, or writes a turn in another way when others
                follow, so that it is not known which part of the text is the answer.
        """
        whole, pieces, done = self._render(conversation, conversation.messages), list[Piece](), 0
        for i, turn in enumerate(conversation.messages):
            if turn["role"] != "assistant":
                continue
            where = f"{conversation.where}, turn {i + 1}"
            written = self._render(conversation, conversation.messages[: i + 1])
            if not whole.startswith(written):
                raise PEFTError(
                    f"{where}: {self.name} writes this answer in another way when other turns follow it (it may leave "
                    "out the reasoning). End the example with this turn, and give the turns after it in another one."
                )
            start = self._start(conversation, i, written)
            answer = written[start:]
            if not all(said in answer for said in _said(turn)):
                raise PEFTError(f"{where}: {self.name} leaves the answer out; expected it in {answer!r}")
            end = start + len(self._without_space(answer))
            pieces += [Piece(whole[done:start], False), Piece(whole[start:end], True)]
            done = end
        self._refuse_left_out(conversation, whole)
        # What follows the last answer: other turns, or white space.
        rest = whole[done:]
        return [*pieces, Piece(rest, False)] if rest.strip() else pieces

    def _start(self, conversation: Conversation, i: int, written: str) -> int:
        # Generation begins behind the header of the answer's turn. A template may write more there than the answer of
        # a conversation has (an opening <think>): then what both have in common.
        before = self._render(conversation, conversation.messages[:i])
        opened = self._render(conversation, conversation.messages[:i], add_generation_prompt=True)
        return max(_common(opened, written), _common(before, written))

    def _refuse_left_out(self, conversation: Conversation, written: str) -> None:
        """Raise :class:`PEFTError` for what is said to the model and does not stand in the text."""
        for number, turn in enumerate(conversation.messages, start=1):
            if turn["role"] in ("system", "developer", "user") and (turn.get("content") or "").strip() not in written:
                raise PEFTError(
                    f"{conversation.where}, turn {number}: {self.name} leaves the {turn['role']}'s turn out; put its "
                    "text into another turn, or give a template that writes it: chat_template=FILE.jinja"
                )
        if conversation.tools and not all(name in written for name in map(_name, conversation.tools)):
            raise PEFTError(
                f"{conversation.where}: {self.name} leaves the tools out; drop the field, or give a template that "
                "writes them: chat_template=FILE.jinja"
            )

    def _without_space(self, answer: str) -> str:
        stripped = answer.rstrip()
        return stripped if stripped.endswith(tuple(self.tokenizer.all_special_tokens)) else answer

    def _render(self, conversation: Conversation, messages: list[Message], **options: Any) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tools=conversation.tools, chat_template=self.template, tokenize=False, **options
            )
        except (TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            raise PEFTError(f"{conversation.where}: {self.name} cannot write this conversation: {error}") from error
        return str(text)


def _said(turn: Message) -> list[str]:
    """What an answer says, in whatever form a template writes it: its text, and the names of the tools it calls."""
    return [(turn.get("content") or "").strip(), *map(_name, turn.get("tool_calls") or ())]


def _name(tool: Any) -> str:
    """The name of a tool, or of one that is called, if it has one where models are told it."""
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    return str(function.get("name", "")) if isinstance(function, dict) else ""


def _common(a: str, b: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def chat_template(tokenizer: PreTrainedTokenizerBase, choice: bool | str) -> ChatTemplate | None:
    """Return the template to use, if any.

    Args:
        tokenizer: The model's.
        choice: True takes the tokenizer's own if it has one, False none, and a path the Jinja file there.

    Raises:
        PEFTError: There is no such file.
    """
    if isinstance(choice, str):
        file = Path(choice).expanduser()
        if not file.is_file():
            raise PEFTError(f"chat_template: file {choice!r} not found; give a Jinja file, true or false")
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise PEFTError(f"chat_template: {choice!r} is not UTF-8 ({error}); save the file as UTF-8") from error
        return ChatTemplate(tokenizer, text, f"the chat template {choice}")
    return ChatTemplate(tokenizer) if choice and tokenizer.chat_template else None


def plain_pieces(conversation: Conversation, eos_token: str) -> list[Piece]:
    """Write a conversation without a template: a prompt, white space, an answer, and the token that ends a text.

    Raises:
        PEFTError: It has more turns than a question and an answer.
    """
    if conversation.text is not None:
        return [Piece(conversation.text + eos_token, True)]
    prompt, answer = plain_prompt(conversation), plain_answer(conversation)
    parted = prompt[-1].isspace() or answer[0].isspace()
    return [Piece(prompt, False), Piece((answer if parted else f" {answer}") + eos_token, True)]


def plain_answer(conversation: Conversation) -> str:
    """Return the answer.

    Raises:
        PEFTError: There is none, or one that is not a text alone.
    """
    turn = conversation.messages[-1] if conversation.messages else {}
    if turn.get("tool_calls") or not turn.get("content"):
        raise PEFTError(
            f"{conversation.where}: the answer calls tools, or there is none; without a chat template an answer is a "
            "text"
        )
    return str(turn["content"])


def plain_prompt(conversation: Conversation) -> str:
    """Return the only turn before the answer.

    Raises:
        PEFTError: There are others.
    """
    turns = conversation.prompt.messages
    if len(turns) != 1:
        roles = ", ".join(turn["role"] for turn in turns)
        raise PEFTError(
            f"{conversation.where}: turns of {roles} stand before the answer, and the tokenizer has no chat template "
            "that says how they are written, or chat_template=False was given; give chat_template=FILE.jinja"
        )
    return str(turns[0]["content"])
