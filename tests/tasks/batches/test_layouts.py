"""The layouts in which people keep their examples, and what is wrong with a file that has none of them."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from lightning_peft import PEFTError
from lightning_peft.tasks.batches.layouts import conversation
from lightning_peft.tasks.batches.records import Record, read_records

QUESTION, ANSWER = {"role": "user", "content": "red?"}, {"role": "assistant", "content": "apple"}
SYSTEM = {"role": "system", "content": "Be brief."}
SAME: dict[str, dict[str, Any]] = {
    "messages": {"messages": [QUESTION, ANSWER]},
    "messages as text": {"messages": json.dumps([QUESTION, ANSWER])},
    "ShareGPT": {"conversations": [{"from": "human", "value": "red?"}, {"from": "gpt", "value": "apple"}]},
    "ShareGPT with roles": {"conversations": [QUESTION, ANSWER]},
    "prompt, completion": {"prompt": "red?", "completion": "apple"},
    "prompt, answer": {"prompt": "red?", "answer": "apple"},
    "turns in prompt, completion": {"prompt": [QUESTION], "completion": [ANSWER]},
    "turns in prompt, text": {"prompt": [QUESTION], "completion": "apple"},
    "question, answer": {"question": "red?", "answer": "apple"},
    "alpaca": {"instruction": "red?", "input": "", "output": "apple"},
}


@pytest.mark.parametrize("fields", SAME.values(), ids=SAME)
def test_every_layout_says_the_same(fields: dict[str, Any]) -> None:
    assert conversation(Record("f:1", fields)).messages == [QUESTION, ANSWER]
    assert conversation(Record("f:1", fields), answered=False).prompt.messages == [QUESTION]


def test_what_layouts_have_beside() -> None:
    alpaca = {"instruction": "Name it.", "input": "red", "output": "apple", "system": "Be brief."}
    assert conversation(Record("f:1", alpaca)).messages == [
        SYSTEM,
        {"role": "user", "content": "Name it.\nred"},
        ANSWER,
    ]
    for name in ("messages", "ShareGPT", "prompt, completion", "turns in prompt, completion"):
        assert conversation(Record("f:1", {**SAME[name], "system": "Be brief."})).messages == [SYSTEM, QUESTION, ANSWER]
    tools = [{"type": "function", "function": {"name": "look"}}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
    turns = [QUESTION, call, {"role": "tool", "content": "a tree"}, ANSWER]
    found = conversation(Record("f:1", {"messages": turns, "tools": json.dumps(tools)}))
    assert (found.messages, found.tools) == (turns, tools)
    assert conversation(Record("f:1", {"text": "All of it."})).text == "All of it."


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": [{"role": "robot", "content": "x"}]}, "turn 1: the role is 'robot'; expected one of system, "),
        ({"messages": [QUESTION, {**ANSWER, "content": " "}]}, "turn 2: the assistant's turn is empty"),
        ({"messages": [QUESTION, {**ANSWER, "content": ["x"]}]}, r"turn 2: the content is \['x'\]; expected a text"),
        ({"messages": [SYSTEM, QUESTION, ANSWER], "system": "x"}, "a field 'system' stands beside a first turn"),
        ({"messages": [SYSTEM]}, "the last turn is the system's; expected an answer"),
        ({"messages": [QUESTION, {**ANSWER, "content": ""}], "system": "x"}, "turn 2: the assistant's turn is empty"),
        ({"messages": [QUESTION, {**ANSWER, "weight": 0}, QUESTION, ANSWER]}, "turn 2: weight=0 says how much"),
        ({"messages": [QUESTION, {**ANSWER, "train": False}, QUESTION, ANSWER]}, "turn 2: train=False says how much"),
        ({"messages": [QUESTION]}, "the last turn is the user's; expected an answer"),
        ({"messages": [ANSWER]}, "the conversation begins with an answer"),
        ({"messages": []}, r"field 'messages' is \[\]; expected a list of turns"),
        ({"messages": "not json"}, "field 'messages' is 'not json'; expected JSON"),
        ({"messages": [QUESTION, ANSWER], "tools": {"a": 1}}, "field 'tools' is .* expected a list"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "a turn is from 'alien'; expected one of system, human"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, r"a turn is from \['human'\]; expected one of"),
        ({"prompt": [QUESTION], "answer": 3}, "expected a list of turns"),
        ({"messages": [QUESTION, {**ANSWER, "tool_calls": "look"}]}, "turn 2: tool_calls is 'look'; expected a list"),
        ({"conversations": [{"from": "human"}]}, "turn 1: the user's turn is empty"),
        ({"instruction": "x"}, "expected a field 'answer' or 'completion' or 'output'"),
        (
            {"chosen": "x", "rejected": "y"},
            r"expected the fields of one of these layouts: messages; .*Found \['chosen'",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_place(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PEFTError, match=rf"data\.jsonl:7.*{message}"):
        conversation(Record("data.jsonl:7", fields))


ROWS = [{"prompt": "red", "answer": "apple"}, {"prompt": "green", "answer": "pear"}]


def as_jsonl(path: Path) -> str:
    path.with_suffix(".jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return f"{path}.jsonl"


def as_json_lines_called_json(path: Path) -> str:
    path.with_suffix(".json").write_text("\n".join(map(json.dumps, ROWS)))
    return f"{path}.json"


def as_json(path: Path) -> str:
    path.with_suffix(".json").write_text(json.dumps(ROWS, indent=1))
    return f"{path}.json"


def as_csv(path: Path) -> str:
    with path.with_suffix(".csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["prompt", "answer"])
        writer.writeheader()
        writer.writerows(ROWS)
    return f"{path}.csv"


def as_parquet(path: Path) -> str:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(ROWS), f"{path}.parquet")
    return f"{path}.parquet"


def as_saved_dataset(path: Path) -> str:
    pytest.importorskip("datasets").Dataset.from_list(ROWS).save_to_disk(str(path))
    return str(path)


@pytest.mark.parametrize("save", [as_jsonl, as_json_lines_called_json, as_json, as_csv, as_parquet, as_saved_dataset])
def test_every_kind_of_file_is_read(tmp_path: Path, save: Any) -> None:
    assert [record.fields for record in read_records(save(tmp_path / "data"), "train_file")] == ROWS


def test_tables_have_turns_of_several_kinds(tmp_path: Path) -> None:
    """A table has every column in every row, and every key in every object: those that a row has not are None."""
    datasets = pytest.importorskip("datasets")
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}
    turns = [[QUESTION, call, {"role": "tool", "content": "tree"}, ANSWER], [QUESTION, ANSWER]]
    datasets.Dataset.from_list([{"messages": rows} for rows in turns]).save_to_disk(str(tmp_path / "saved"))
    found = [conversation(record).messages for record in read_records(str(tmp_path / "saved"), "train_file")]
    assert found[1] == turns[1]
    assert [turn.get("tool_calls") for turn in found[0]] == [None, [{"name": "look"}], None, None]


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "splits" / "train").mkdir(parents=True)
    (tmp_path / "splits" / "dataset_dict.json").write_text("{}")
    (tmp_path / "bad.json").write_text("[{]")
    (tmp_path / "numbers.json").write_text('[{"text": "a"}, 3]')
    (tmp_path / "bad.parquet").write_text("no")
    (tmp_path / "half.jsonl").write_text('{"text": "a"}\n{"text": "\\ud83d"}\n')
    (tmp_path / "twice.csv").write_text("text,text\na,b\n")
    for name, message in {
        "empty": "a directory without a saved dataset",
        "splits": "holds the splits train; give one",
        "bad.json": r"bad\.json: not JSON",
        "numbers.json": r"numbers\.json, record 2: expected a JSON object, found int",
        "half.jsonl": r"half\.jsonl:2: not JSON .*surrogates not allowed",
        "twice.csv": r"twice\.csv:1: the header line has 'text' twice",
        "bad.parquet": r"bad\.parquet: (not Parquet|reading Parquet needs the package pyarrow)",
    }.items():
        with pytest.raises(PEFTError, match=message):
            read_records(str(tmp_path / name), "train_file")


def test_long_fields_of_csv_are_read(tmp_path: Path) -> None:
    (tmp_path / "long.csv").write_text("text\n" + "a" * 200_000 + "\n")
    limit = csv.field_size_limit()
    (record,) = read_records(str(tmp_path / "long.csv"), "train_file")
    assert len(record.fields["text"]) == 200_000
    assert csv.field_size_limit() == limit
