"""The layouts in which people keep examples for a language model, and the one form that the rest works with."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from lightning_peft.errors import PEFTError
from lightning_peft.tasks.batches.records import Record
from lightning_peft.tasks.batches.wikisql import query_prompt, query_text

Message = dict[str, Any]
"""One turn: `role`, `content`, and whatever else the chat template reads, such as `tool_calls`."""

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}
"""What ShareGPT's files call the speakers."""


class Conversation(NamedTuple):
    """An example: turns of a conversation, or a plain text.

    Attributes:
        where: The file and the place in it, for messages.
        messages: The turns.
        tools: JSON schemas of tools that the assistant may call.
        text: The plain text, of an example without turns.
        judged_by: What a generated answer is compared with, where that is not the answer that is learned: the result
            alone of one that is learned with its working.
    """

    where: str
    messages: list[Message]
    tools: list[Any] | None = None
    text: str | None = None
    judged_by: str | None = None

    @property
    def expected(self) -> str:
        """What a generated answer is compared with."""
        return self.judged_by or str(self.messages[-1].get("content") or "") if self.messages else ""

    @property
    def prompt(self) -> Conversation:
        """The turns before the last answer, or all if there is none."""
        answered = bool(self.messages) and self.messages[-1]["role"] == "assistant"
        return self._replace(messages=self.messages[:-1]) if answered else self


def conversation(record: Record, *, answered: bool = True) -> Conversation:
    """Read a record in whichever layout it is.

    Args:
        record: With the fields of one of `LAYOUTS`.
        answered: Whether the last turn has to be an answer, as for training.

    Raises:
        PEFTError: The fields are those of no layout, or do not hold what they should.
    """
    for names, read in LAYOUTS.items():
        if names[0] in record.fields:
            found = read(record, answered)
            if answered and found.text is None and found.messages[-1]["role"] != "assistant":
                raise PEFTError(
                    f"{record.where}: the last turn is the {found.messages[-1]['role']}'s; expected an answer"
                )
            return found
    layouts = "; ".join(" + ".join(names) for names in LAYOUTS)
    raise PEFTError(
        f"{record.where}: expected the fields of one of these layouts: {layouts}. Found {sorted(record.fields)}"
    )


def _messages(record: Record, answered: bool) -> Conversation:
    return _turns(record, "messages", lambda turn: turn)


def _sharegpt(record: Record, answered: bool) -> Conversation:
    def message(turn: Message) -> Message:
        if "from" not in turn:
            return turn
        speaker = turn["from"]
        if str(speaker) not in SHAREGPT:
            raise PEFTError(f"{record.where}: a turn is from {speaker!r}; expected one of {', '.join(SHAREGPT)}")
        return {"role": SHAREGPT[speaker], "content": turn.get("value")}

    return _turns(record, "conversations", message)


def _prompt(record: Record, answered: bool) -> Conversation:
    prompt, answer = record.fields["prompt"], next((name for name in ANSWERS if name in record.fields), None)
    if isinstance(prompt, list):
        reply = record.fields[answer] if answer and answered else []
        if isinstance(reply, str):
            reply = {"role": "assistant", "content": reply}
        turns = [*prompt, *(reply if isinstance(reply, list) else [reply])]
        return _turns(record._replace(fields={**record.fields, "prompt": turns}), "prompt", lambda turn: turn)
    return _one_answer(record, record.text("prompt"), answered)


def _question(record: Record, answered: bool) -> Conversation:
    return _one_answer(record, record.text("question", "source", "document", "dialogue"), answered)


def _alpaca(record: Record, answered: bool) -> Conversation:
    instruction = record.text("instruction")
    prompt = f"{instruction}\n{record.text('input')}" if record.fields.get("input") else instruction
    # LLM-Adapters' files have the working in `output`, which is learned, and its result in `answer`.
    if answered and {"output", "answer"} <= record.fields.keys():
        found = _one_answer(record, prompt, answered, "output")
        return found._replace(judged_by=_result(record, "answer"))
    return _one_answer(record, prompt, answered)


def _svamp(record: Record, answered: bool) -> Conversation:
    messages = [{"role": "user", "content": f"{record.text('Body').strip()} {record.text('Question').strip()}"}]
    if answered:
        messages.append({"role": "assistant", "content": _result(record, "Answer")})
    return Conversation(record.where, messages)


def _wikisql(record: Record, answered: bool) -> Conversation:
    messages = [{"role": "user", "content": query_prompt(record)}]
    if answered:
        messages.append({"role": "assistant", "content": query_text(record)})
    return Conversation(record.where, messages)


def _text(record: Record, answered: bool) -> Conversation:
    return Conversation(record.where, [], text=record.text("text"))


ANSWERS = ("answer", "completion", "output", "response", "target", "summary")
LAYOUTS: dict[tuple[str, ...], Callable[[Record, bool], Conversation]] = {
    ("messages",): _messages,
    ("conversations",): _sharegpt,
    ("prompt", "completion (or answer)"): _prompt,
    ("table_id", "question", "sql"): _wikisql,
    ("Body", "Question", "Answer"): _svamp,
    ("question", "answer"): _question,
    ("source", "target"): _question,
    ("document", "summary"): _question,
    ("dialogue", "summary"): _question,
    ("instruction", "input (may be missing)", "output"): _alpaca,
    ("text",): _text,
}
"""What a record of each layout has; the first name tells them apart."""


def _one_answer(record: Record, prompt: str, answered: bool, *names: str) -> Conversation:
    messages = [{"role": "user", "content": prompt}]
    if record.fields.get("system"):
        messages.insert(0, {"role": "system", "content": record.text("system")})
    if answered:
        messages.append({"role": "assistant", "content": record.text(*(names or ANSWERS))})
    return Conversation(record.where, messages)


def _result(record: Record, field: str) -> str:
    """Return a number as people write it, or a text."""
    value = record.fields.get(field)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.15g}"
    if field not in record.fields or not isinstance(value, str) or not value.strip():
        raise PEFTError(f"{record.where}: field {field!r} is {_short(value)}; expected a number or a text")
    return value


def _turns(record: Record, field: str, message: Callable[[Message], Message]) -> Conversation:
    turns = _parsed(record, field)
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise PEFTError(
            f"{record.where}: field {field!r} is {_short(turns)}; expected a list of turns that is not empty"
        )
    system = _system(record, turns)
    messages = [*system, *map(message, turns)]
    for number, turn in enumerate(messages, start=1 - len(system)):
        where = f"{record.where}, turn {number}"
        role, content = turn.get("role"), turn.get("content")
        if role not in ROLES:
            raise PEFTError(f"{where}: the role is {role!r}; expected one of {', '.join(ROLES)}")
        if not isinstance(content, str | None):
            raise PEFTError(f"{where}: the content is {_short(content)}; expected a text")
        calls = turn.get("tool_calls") or []
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise PEFTError(f"{where}: tool_calls is {_short(calls)}; expected a list of objects")
        if unlearned := [
            f"{key}={turn[key]!r}" for key in ("weight", "train") if turn.get(key, True) not in (True, None)
        ]:
            raise PEFTError(
                f"{where}: {unlearned[0]} says how much of the turn is learned; every answer is learned here. Leave it "
                "out, or make one example of the turns up to each answer that is to be learned, with prompt and answer"
            )
        if not (content or "").strip() and not calls:
            raise PEFTError(f"{where}: the {role}'s turn is empty; expected a text")
    if messages[0]["role"] == "assistant":
        raise PEFTError(
            f"{record.where}: the conversation begins with an answer; expected a turn of the user before it"
        )
    tools = _parsed(record, "tools")
    if not isinstance(tools, list | None):
        raise PEFTError(f"{record.where}: field 'tools' is {_short(tools)}; expected a list of JSON schemas")
    return Conversation(record.where, messages, tools or None)


def _system(record: Record, turns: list[Message]) -> list[Message]:
    """Return the turn that stands in a field of its own, where the others do not begin with one."""
    if not record.fields.get("system"):
        return []
    if turns[0].get("role", turns[0].get("from")) in ("system", "developer"):
        raise PEFTError(
            f"{record.where}: a field 'system' stands beside a first turn of that role; expected one of them"
        )
    return [{"role": "system", "content": record.text("system")}]


def _parsed(record: Record, field: str) -> Any:
    # CSV has no lists, and tables often keep them as text since their objects are not all of one kind.
    value = record.fields.get(field)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise PEFTError(f"{record.where}: field {field!r} is {_short(value)}; expected JSON ({error})") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
