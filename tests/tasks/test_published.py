"""Published data sets, as their authors lay them out: small files of the same layout, and what is wrong with others."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from lightning_peft import PEFTError
from lightning_peft.tasks import ClassificationData, InstructionData
from lightning_peft.tasks.answers.last_number import last_number
from lightning_peft.tasks.answers.logical_form import logical_form
from lightning_peft.tasks.answers.text_metrics import text_metrics
from lightning_peft.tasks.batches.layouts import Conversation, conversation
from lightning_peft.tasks.batches.published import as_published
from lightning_peft.tasks.batches.records import read_records

SNLI = {"annotator_labels": ["neutral"], "captionID": "1.jpg#4", "pairID": "1.jpg#4r1n"}
PAIR = {**SNLI, "gold_label": "neutral", "sentence1": "a red apple", "sentence2": "a pear"}
TABLES = [
    {"id": "1-1-1", "header": ["Player", "No.", 'The "best"', "No."], "types": ["text"] * 4, "rows": [], "name": "t"},
    {"id": "1-1-2", "header": ["Year"], "types": ["real"], "rows": [[2001]], "page_title": "x"},
]
QUESTIONS = [
    {
        "phase": 1,
        "table_id": "1-1-1",
        "question": "How many?",
        "sql": {"sel": 0, "conds": [[1, 0, "3"], [2, 1, "it's"]], "agg": 3},
    },
    {"phase": 1, "table_id": "1-1-2", "question": "Which year?", "sql": {"sel": 0, "conds": [], "agg": 0}},
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def wikisql(folder: Path, questions: list[dict[str, Any]], tables: list[dict[str, Any]] = TABLES) -> str:
    write(folder / "dev.tables.jsonl", tables)
    return write(folder / "dev.jsonl", questions)


def conversations(path: str, *, answered: bool = True) -> list[Conversation]:
    records = as_published(read_records(path, "train_file"), path, answered=answered)
    return [conversation(record, answered=answered) for record in records]


def asked(found: Conversation) -> list[str]:
    return [turn["content"] for turn in found.messages]


def test_wikisql_is_written_as_sql(tmp_path: Path) -> None:
    first, second = conversations(wikisql(tmp_path, QUESTIONS))
    columns = '"Player", "No. (2)", "The ""best""", "No. (4)"'
    condition = '"No. (2)" = \'3\' AND "The ""best""" > \'it\'\'s\''
    prompt = f"table({columns})\nHow many?\nSQL:"
    assert asked(first) == [prompt, f'SELECT COUNT("Player") FROM table WHERE {condition}']
    assert asked(second)[1] == 'SELECT "Year" FROM table'
    assert asked(conversations(wikisql(tmp_path, QUESTIONS), answered=False)[0]) == [prompt]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"table_id": "9"},
            r"dev\.jsonl:2: field 'table_id' is '9'; expected the id of a table in .*dev\.tables\.jsonl",
        ),
        ({"table_id": ["9"]}, r"dev\.jsonl:2: field 'table_id' is \['9'\]"),
        ({"sql": "SELECT 1"}, r"dev\.jsonl:2: field 'sql' is 'SELECT 1' .*expected \{sel: column"),
        ({"sql": {"sel": 1, "agg": 0, "conds": []}}, r"dev\.jsonl:2: .* about a table of 1 columns; expected"),
        ({"sql": {"sel": -1, "agg": 0, "conds": []}}, r"dev\.jsonl:2: field 'sql'"),
        ({"sql": {"sel": 0, "agg": 9, "conds": []}}, r"dev\.jsonl:2: field 'sql'"),
        ({"sql": {"sel": 0, "agg": 0, "conds": [[0, 3, "x"]]}}, r"dev\.jsonl:2: field 'sql'"),
        ({"sql": {"sel": 0, "agg": 0, "conds": [[0, 0, None]]}}, r"dev\.jsonl:2: field 'sql'"),
        ({"sql": {"sel": 0, "agg": 0}}, r"dev\.jsonl:2: field 'sql'"),
        ({"question": ""}, r"dev\.jsonl:2: field 'question' is ''"),
    ],
)
def test_what_is_no_question_of_wikisql(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(PEFTError, match=message):
        conversations(wikisql(tmp_path, [QUESTIONS[1], {**QUESTIONS[1], **change}]))


def test_the_tables_of_wikisql_are_looked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "dev.jsonl", QUESTIONS)
    with pytest.raises(PEFTError, match=r"dev\.jsonl:1: the question is about a table; expected .*dev\.tables\.jsonl"):
        conversations(path)
    with pytest.raises(PEFTError, match=r"dev\.tables\.jsonl:1: field 'header' is \[\]; expected a list of columns"):
        conversations(wikisql(tmp_path, QUESTIONS, [{"id": "1-1-1", "header": []}]))
    with pytest.raises(PEFTError, match=r"dev\.tables\.jsonl:1: expected a field 'id'"):
        conversations(wikisql(tmp_path, QUESTIONS, [{"header": ["a"]}]))


GSM8K = {"question": "How many?", "answer": "It is 16-3=<<16-3=13>>13.\n#### 13"}
MATHS = {"instruction": "How many?", "input": "", "output": "16 - 3 = 13. The answer is 13.", "answer": "13.0"}
SVAMP = {
    "ID": "c-1",
    "Body": "He had 16",
    "Question": "How many are left?",
    "Equation": "( 16.0 - 3.0 )",
    "Answer": 13.0,
}


def test_arithmetic_problems_are_read_as_published(tmp_path: Path) -> None:
    (gsm,) = conversations(write(tmp_path / "g.jsonl", [GSM8K]))
    assert (asked(gsm), gsm.expected) == ([GSM8K["question"], GSM8K["answer"]], GSM8K["answer"])
    (svamp,) = conversations(write(tmp_path / "SVAMP.json", [SVAMP]))
    assert (asked(svamp), svamp.expected) == (["He had 16 How many are left?", "13"], "13")
    (maths,) = conversations(write(tmp_path / "math.json", [MATHS]))
    # The working is learned, the result judged by.
    assert (asked(maths), maths.expected) == (["How many?", MATHS["output"]], "13.0")
    with pytest.warns(UserWarning, match=r"1 of 2 records in .* have an answer and no output"):
        assert len(conversations(write(tmp_path / "math.json", [MATHS, {**MATHS, "output": ""}]))) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**SVAMP, "Answer": None}, "field 'Answer' is None; expected a number or a text"),
        ({**SVAMP, "Answer": [1]}, r"field 'Answer' is \[1\]; expected a number or a text"),
        ({**SVAMP, "Answer": True}, "field 'Answer' is True"),
        ({"Body": "x", "Question": "y"}, "field 'Answer' is None"),
        ({"Body": "x", "Answer": 1}, "expected a field 'Question'"),
        ({**MATHS, "answer": ""}, "field 'answer' is ''; expected a number or a text"),
        ({**MATHS, "output": 3}, "field 'output' is 3; expected a text"),
    ],
)
def test_what_is_no_arithmetic_problem(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(PEFTError, match=rf"data\.json, record 2: {message}"):
        conversations(write(tmp_path / "data.json", [SVAMP, row]))


def test_dialogues_with_several_summaries(tmp_path: Path) -> None:
    samsum = {"id": "1", "summary": "They meet.", "dialogue": "A: Hi\r\nB: Hi"}
    assert asked(conversations(write(tmp_path / "s.json", [samsum]))[0]) == ["A: Hi\r\nB: Hi", "They meet."]
    test = {
        "fname": "t_0",
        "dialogue": "A: Hi",
        "summary1": "one",
        "topic1": "x",
        "summary2": "two",
        "summary3": "three",
    }
    path = write(tmp_path / "t.jsonl", [test])
    assert [asked(found)[1] for found in conversations(path)] == ["one", "two", "three"]
    assert len(conversations(path, answered=False)) == 1
    with pytest.raises(PEFTError, match=r"t\.jsonl:1, summary2: field 'summary' is ''; expected a text"):
        conversations(write(tmp_path / "t.jsonl", [{**test, "summary2": ""}]))
    with pytest.raises(PEFTError, match=r"s\.json, record 1: expected a field 'answer' .*'summary'"):
        conversations(write(tmp_path / "s.json", [{"id": "1", "dialogue": "A: Hi"}]))


def test_metrics_of_arithmetic_and_of_sql() -> None:
    numbers = {"It costs $1,234.50.": 1234.5, "16-3=13": 13, "5 - 7 = -2": -2, "7-2": 2, "no": None, "-0.5 it is": -0.5}
    assert {text: last_number(text) for text in numbers} == numbers
    assert last_number("#### 42") == 42
    metric = text_metrics(["last_number"])["last_number"]
    metric.update(["so 4", "4.0005", "5", "none", "4, not 5"], ["The answer is 4.0", "4", "4", "4", "4"])
    assert metric.compute().item() == pytest.approx(2 / 5)

    right = "SELECT COUNT(\"No.\") FROM table WHERE Name = 'Ida B.' AND \"No. (2)\" > '3'"
    same = "select count(`No.`) from table where \"No. (2)\" > 3 and name = 'ida b.';"
    assert logical_form(right) == logical_form(same) is not None
    for other in (
        right.replace("COUNT", "MAX"),
        right.replace(">", "<"),
        right.replace("'3'", "'4'"),
        right + " AND Year = '1'",
        right + " ORDER BY Year",
        right.replace(" AND ", " OR "),
        "COUNT(x)",
        "",
    ):
        assert logical_form(right) != logical_form(other), other
    # What joins conditions in another way keeps its order; a text may hold the words of the language.
    assert logical_form("SELECT a FROM t WHERE a = 1 OR b = 2") != logical_form("SELECT a FROM t WHERE b = 2 OR a = 1")
    texts = [
        "SELECT a FROM t WHERE a = 'x and y' AND \"and\" = 1",
        "SELECT a FROM t WHERE \"and\" = 1 AND a = 'x and y'",
    ]
    assert logical_form(texts[0]) == logical_form(texts[1])


def test_wikisql_forms_are_compared_as_its_authors_do(tmp_path: Path) -> None:
    """The judge: the numbers of the queries themselves, conditions as a set, values without case."""
    draw = random.Random(0)
    table = {"id": "1", "header": ["Name", "No.", "a b", "AND"]}

    def query() -> dict[str, Any]:
        conditions = [[draw.randrange(4), draw.randrange(3), draw.choice(["x", "X", "1", "x and y"])] for _ in range(2)]
        return {"sel": draw.randrange(2), "agg": draw.randrange(3), "conds": conditions}

    queries = [query() for _ in range(60)]
    rows = [{"table_id": "1", "question": "?", "sql": sql} for sql in queries]
    texts = [asked(found)[1] for found in conversations(wikisql(tmp_path, rows, [table]))]
    forms = [(q["sel"], q["agg"], frozenset((c, o, v.lower()) for c, o, v in q["conds"])) for q in queries]
    pairs = [(i, j) for i in range(60) for j in range(60)]
    assert sum(forms[i] == forms[j] for i, j in pairs) > 60
    for i, j in pairs:
        assert (logical_form(texts[i]) == logical_form(texts[j])) == (forms[i] == forms[j]), (texts[i], texts[j])


@pytest.fixture(scope="module")
def words() -> t.PreTrainedTokenizerFast:
    """A tokenizer that writes pairs as BERT's does."""
    raw = Tokenizer(models.WordLevel({"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, "a": 4, "red": 5}, "[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return t.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="[PAD]",
        eos_token="[SEP]",
        padding_side="left",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def labelled(path: str, words: t.PreTrainedTokenizerFast, folder: Path) -> ClassificationData:
    words.save_pretrained(folder / "model")
    t.BertConfig(vocab_size=6, hidden_size=8, num_attention_heads=2, intermediate_size=8).save_pretrained(
        folder / "model"
    )
    data = ClassificationData(path, path, tokenizer=str(folder / "model"), batch_size=8)
    data.setup("fit")
    return data


@pytest.mark.parametrize("layout", ["snli", "hub", "tsv"])
def test_pairs_are_read_as_published(tmp_path: Path, words: Any, layout: str) -> None:
    rows = [
        PAIR,
        {**PAIR, "gold_label": "-"},
        {**PAIR, "gold_label": "entailment", "sentence1": 'a "red', "sentence2": "red a"},
    ]
    if layout == "snli":
        path = write(tmp_path / "train.jsonl", rows)
    elif layout == "hub":
        names = {"sentence1": "premise", "sentence2": "hypothesis", "gold_label": "label"}
        path = write(
            tmp_path / "train.json", [{new: row[old] for old, new in names.items()} for row in (rows[0], rows[2])]
        )
    else:
        keys = ("sentence1", "sentence2", "gold_label")
        path = str(tmp_path / "train.tsv")
        Path(path).write_text("\n".join("\t".join(line) for line in [keys, *([row[k] for k in keys] for row in rows)]))
    if layout == "hub":
        data = labelled(path, words, tmp_path)
    else:
        with pytest.warns(UserWarning, match=r"1 of 3 records in .* have the label '-'"):
            data = labelled(path, words, tmp_path)
    assert data.labels == ["entailment", "neutral"]
    (batch,) = data.val_dataloader()
    assert batch["labels"].tolist() == [1, 0]
    # [CLS] a red [UNK] [SEP] a [UNK] [SEP], and the quotation mark of the other is a word of its own.
    assert batch["input_ids"].tolist() == [[1, 4, 5, 3, 2, 4, 3, 2], [1, 4, 3, 5, 2, 5, 4, 2]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 0, 1, 1, 1]] * 2


def test_scores_of_an_encoder_do_not_depend_on_the_batch(tmp_path: Path, words: Any) -> None:
    path = write(tmp_path / "t.jsonl", [{"text": "a red a red a", "label": 0}, {"text": "red", "label": 1}])
    (batch,) = labelled(path, words, tmp_path).val_dataloader()
    torch.manual_seed(0)
    model = t.BertForSequenceClassification(t.BertConfig.from_pretrained(tmp_path / "model")).eval()
    alone = words("red", return_tensors="pt")
    torch.testing.assert_close(model(**batch).logits[1], model(**alone).logits[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sentence1": "a", "gold_label": "neutral"}, "expected a field 'sentence2'"),
        ({"sentence2": "a", "gold_label": "neutral"}, "expected a field 'sentence1'"),
        ({**PAIR, "sentence2": ""}, "field 'sentence2' is ''; expected a text"),
        (
            {"premise": "a", "hypothesis": "b", "label": None},
            "field 'label' is None; expected a text or a whole number",
        ),
        (
            {"premise": "a", "hypothesis": "b", "category": "x"},
            r"expected a label in label or gold_label\. Found ",
        ),
        ({**PAIR, "gold_label": 1.5}, "field 'gold_label' is 1.5; expected a text or a whole number"),
        ({**PAIR, "gold_label": "hidden"}, "label 'hidden' does not occur in"),
    ],
)
def test_what_is_no_pair(tmp_path: Path, words: Any, row: dict[str, Any], message: str) -> None:
    write(tmp_path / "good.jsonl", [PAIR])
    data = labelled(str(tmp_path / "good.jsonl"), words, tmp_path)
    data.files["val"] = write(tmp_path / "val.jsonl", [PAIR, row])
    with pytest.raises(PEFTError, match=rf"val\.jsonl:2: {message}"):
        data.val_dataloader()


def test_a_file_without_a_label_on_which_annotators_agreed(tmp_path: Path) -> None:
    path = write(tmp_path / "dev.jsonl", [{**PAIR, "gold_label": "-"}])
    with pytest.raises(PEFTError, match=r"dev\.jsonl: all records have the label '-'"):
        ClassificationData(path).setup("fit")


@pytest.mark.parametrize(
    ("metric", "row", "message"),
    [
        ("last_number", {"prompt": "x", "answer": "none"}, "the answer is 'none'; expected one that holds a number"),
        ("logical_form", {"prompt": "x", "answer": "4"}, "the answer is '4'; expected a query that begins with SELECT"),
    ],
)
def test_answers_that_no_metric_could_judge_are_found_before_anything_is_generated(
    tmp_path: Path, words: Any, metric: str, row: dict[str, str], message: str
) -> None:
    class Module:
        text_metrics = text_metrics([metric])
        tokenizer = words

    class Trainer:
        lightning_module = Module()

    good = {"prompt": "a", "answer": "SELECT 3"}
    data = InstructionData(test_file=write(tmp_path / "test.jsonl", [good, row]))
    data.trainer = Trainer()  # type: ignore[assignment]
    with pytest.raises(PEFTError, match=rf"test\.jsonl:2: the metric {metric} was asked for, and {message}"):
        data.setup("test")
