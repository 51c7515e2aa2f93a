"""The quickstart: its questions, its judge, and the whole path, from the command to files that others read."""

import json
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lightning_peft import load_adapter

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from text_to_sql import ReadOnlyDatabase, execution_accuracy, same_result, write_data  # noqa: E402


def run_quickstart(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "quickstart.py"), *arguments],
        cwd=folder,
        # With all threads, as users run it.
        env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder, train=100, test=40)
    return folder


@pytest.fixture
def database(data: Path) -> ReadOnlyDatabase:
    return ReadOnlyDatabase(data / "tables.sqlite")


def records(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_questions_are_disjoint_and_have_results(data: Path) -> None:
    train, test = records(data / "train.jsonl"), records(data / "test.jsonl")
    assert (len(train), len(test)) == (100, 40)
    assert not {r["answer"] for r in train} & {r["answer"] for r in test}
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in test}
    with sqlite3.connect(data / "tables.sqlite") as plain:
        for record in train + test:
            rows = plain.execute(record["answer"]).fetchall()
            assert rows
            assert rows[0][0] not in (0, None)


def test_the_same_seed_makes_the_same_files(data: Path, tmp_path: Path) -> None:
    write_data(tmp_path, train=100, test=40)
    assert (tmp_path / "train.jsonl").read_bytes() == (data / "train.jsonl").read_bytes()


@pytest.mark.parametrize(
    "query",
    [
        "DELETE FROM books",
        "INSERT INTO books SELECT * FROM books",
        "DROP TABLE books",
        "ATTACH DATABASE '/tmp/other.sqlite' AS other",
        "PRAGMA query_only = OFF",
        "SELECT nothing FROM books",
        "SELECT 1; SELECT 2",
        "SELECT load_extension('x')",
        "",
    ],
)
def test_harmful_and_broken_queries_are_refused(database: ReadOnlyDatabase, query: str) -> None:
    before = database.run("SELECT COUNT(*) FROM books")
    assert database.run(query) is None
    assert database.run("SELECT COUNT(*) FROM books") == before == [(60,)]


def test_a_query_that_hangs_is_stopped(data: Path) -> None:
    database = ReadOnlyDatabase(data / "tables.sqlite", seconds=0.2)
    start = time.monotonic()
    assert database.run("SELECT COUNT(*) FROM books a, books b, books c, books d, books e, books f") is None
    assert time.monotonic() - start < 5


def test_results_are_compared_as_the_question_asks() -> None:
    assert same_result("SELECT a", [(1,), (2,)], [(2,), (1,)])
    assert not same_result("SELECT a ORDER BY b", [(1,), (2,)], [(2,), (1,)])
    assert not same_result("SELECT a", [(1,), (1,)], [(1,)])
    assert not same_result("SELECT a", [(1,)], None)


def test_accuracy_counts_what_it_says(database: ReadOnlyDatabase) -> None:
    gold = ["SELECT COUNT(*) FROM books"] * 4
    predicted = [gold[0], "SELECT COUNT(title) FROM books", "SELECT MAX(year) FROM books", "SELECT"]
    score = execution_accuracy(database, gold, predicted)
    assert (score.execution, score.exact, score.valid) == (0.5, 0.25, 0.75)


def test_the_fast_path_writes_files_that_others_read(tmp_path: Path) -> None:
    output = run_quickstart(tmp_path, "--fast")
    assert "right result" in output
    out = tmp_path / ".quickstart"
    ids = torch.arange(1, 9)[None]
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")(input_ids=ids).logits
    plain = AutoModelForCausalLM.from_pretrained(out / "tiny")
    assert (plain(input_ids=ids).logits - merged).abs().max() > 1e-6
    load_adapter(plain, out / "adapter")
    assert (plain(input_ids=ids).logits - merged).abs().max() < 1e-5
    base = AutoModelForCausalLM.from_pretrained(out / "tiny")
    judge = PeftModel.from_pretrained(base, out / "checkpoints" / "last")
    assert (judge(input_ids=ids).logits - merged).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(1300)  # a few minutes on two cores that do nothing else
def test_the_real_model_learns_sql(tmp_path: Path) -> None:
    output = run_quickstart(tmp_path)
    line = next(line for line in output.splitlines() if line.startswith("right result"))
    before, after = map(float, line.split()[-2:])
    assert before <= 0.25
    assert after >= 0.85
