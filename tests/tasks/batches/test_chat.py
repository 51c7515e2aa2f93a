"""What of a conversation is learned, judged by the tokenizer's own rendering of it."""

from typing import Any

import pytest
import transformers as t
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lightning_peft import PEFTError
from lightning_peft.adapters.virtual_tokens.infix import IGNORED
from lightning_peft.tasks.batches.chat import chat_template
from lightning_peft.tasks.batches.encoding import Encoder, Example, cut
from lightning_peft.tasks.batches.layouts import Conversation

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}<|im_start|>\n\n{{ m.content | trim }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|im_start|>\n\n{% endif %}"
)
# What reasoning models do: the prompt opens a thought, which no written answer has.
OPENED = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
# ... and thoughts of turns before the last are left out.
FORGETS = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else m.content.split('</think>')[-1] }}")
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML
DROPS = CHATML.replace("{{ m.content }}", "{{ m.content if m.role == 'user' }}")
DEAF = CHATML.replace("{{ m.content }}", "{{ m.content if m.role != 'system' }}")
TOOLS = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}" + CHATML

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "red?"},
    {"role": "assistant", "content": "apple"},
    {"role": "user", "content": "green?"},
    {"role": "assistant", "content": "pear"},
]

CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}


def tokenizer(template: str | None) -> Any:
    raw = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    raw.decoder = decoders.ByteLevel()
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made = t.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    made.chat_template = template
    return made


def encode(template: str | None, turns: list[dict[str, Any]], **options: Any) -> tuple[Any, list[Example]]:
    words = tokenizer(template)
    encoder = Encoder(words, chat_template(words, True), **{"max_length": 1000, **options})
    return words, encoder.examples(Conversation("data.jsonl:3", turns))


def learned(words: Any, example: Example) -> list[str]:
    """The runs of tokens that are learned, as text."""
    runs: list[list[int]] = [[]]
    for label in example.labels:
        runs = [*runs, []] if label == IGNORED else [*runs[:-1], [*runs[-1], label]]
    return [words.decode(run) for run in runs if run]


@pytest.mark.parametrize("template", [CHATML, LLAMA3, OPENED], ids=["ChatML", "Llama 3", "opened"])
def test_answers_alone_are_learned_with_the_token_that_ends_them(template: str) -> None:
    words, (example,) = encode(template, TURNS)
    whole = words.apply_chat_template(TURNS, tokenize=True, return_dict=True)["input_ids"]
    assert example.ids == whole[: len(example.ids)]
    assert words.decode(whole[len(example.ids) :]).strip() == ""
    assert learned(words, example) == ["apple<|im_end|>", "pear<|im_end|>"]
    before = words.apply_chat_template(TURNS[:-1], tokenize=True, return_dict=True, add_generation_prompt=True)
    assert before["input_ids"][: len(example.prompt_ids)] == example.prompt_ids
    assert example.answer == "pear"


def test_everything_is_learned_on_demand() -> None:
    _, (example,) = encode(CHATML, TURNS, loss_on="all")
    assert example.labels == [IGNORED, *example.ids[1:]]


@pytest.mark.parametrize(
    ("template", "turns", "message"),
    [
        (STRICT, [{"role": "system", "content": "x"}, *TURNS], "cannot write this conversation: no system turn"),
        (DROPS, TURNS, "turn 2: the tokenizer's chat template leaves the answer out"),
        (DEAF, [SYSTEM, *TURNS], "turn 1: the tokenizer's chat template leaves the system's turn out"),
        (
            FORGETS,
            [TURNS[0], {"role": "assistant", "content": "<think>h</think>apple"}, *TURNS[2:]],
            "turn 2: .* in another way",
        ),
        ("{{ 1 // 0 }}", TURNS, "cannot write this conversation: integer division"),
        (CHATML, [TURNS[0], CALL], "turn 2: the tokenizer's chat template leaves the answer out"),
        (None, [TURNS[0], CALL], "the answer calls tools"),
        (None, TURNS, "turns of user, assistant, user stand before the answer"),
    ],
)
def test_what_a_template_cannot_do_is_said(template: str | None, turns: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(PEFTError, match=rf"data\.jsonl:3.*{message}"):
        encode(template, turns)


def test_a_template_from_a_file(tmp_path: Any) -> None:
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    words = tokenizer(CHATML)
    encoder = Encoder(words, chat_template(words, str(tmp_path / "own.jinja")), 1000)
    assert words.decode(encoder.examples(Conversation("f:1", TURNS[:2]))[0].ids) == "user: red?\nassistant: apple\n"
    assert chat_template(words, False) is None
    with pytest.raises(PEFTError, match=r"chat_template: file 'no\.jinja' not found"):
        chat_template(words, "no.jinja")
    (tmp_path / "latin.jinja").write_bytes("é".encode("latin-1"))
    with pytest.raises(PEFTError, match=r"latin\.jinja' is not UTF-8"):
        chat_template(words, str(tmp_path / "latin.jinja"))


def test_tools_are_written_or_refused() -> None:
    asked = Conversation("data.jsonl:3", TURNS[:2], tools=[{"type": "function", "function": {"name": "look"}}])

    def encoder(template: str) -> Encoder:
        words = tokenizer(template)
        return Encoder(words, chat_template(words, True), 1000)

    for write in ("examples", "prompt"):
        getattr(encoder(TOOLS), write)(asked)
        with pytest.raises(PEFTError, match=r"data\.jsonl:3: the tokenizer's chat template leaves the tools out"):
            getattr(encoder(CHATML), write)(asked)


@pytest.mark.parametrize("options", [{"max_length": -1}, {"max_length": 1}, {"loss_on": "answer"}])
def test_what_cannot_be_asked_for(options: dict[str, Any]) -> None:
    with pytest.raises(PEFTError, match=f"{next(iter(options))}=.* was given; expected"):
        encode(CHATML, TURNS, **options)


def test_a_text_goes_on_in_the_next_example() -> None:
    words = tokenizer(CHATML)
    text = "a long yellow banana"
    rows = Encoder(words, chat_template(words, True), 8).examples(Conversation("f:1", [], text=text))
    assert "".join(words.decode(row.ids) for row in rows) == f"{text}<|im_end|>"
    assert [len(row.ids) for row in rows] == [8, 8, 5]
    assert all(row.labels == [IGNORED, *row.ids[1:]] for row in rows)


def test_what_is_cut_off_is_counted() -> None:
    _, (example,) = encode(CHATML, TURNS)
    total = sum(label != IGNORED for label in example.labels)
    (shorter,), longer, lost = cut([example], len(example.ids) - 3)
    assert (longer, lost, len(shorter.ids)) == (1, 3, len(example.ids) - 3)
    assert sum(label != IGNORED for label in shorter.labels) == total - 3
    with pytest.raises(PEFTError, match="the prompt alone has"):
        encode(CHATML, TURNS, max_length=5)
