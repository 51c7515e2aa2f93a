"""Questions about five small tables, the SQL that answers them, and a judge that executes it.

    python examples/text_to_sql.py --out .quickstart/data

writes `train.jsonl` and `test.jsonl` (fields `prompt` and `answer`) and the SQLite database `tables.sqlite`.
Everything is made up here, from a seed. No query of the test file occurs in the training file, and every
query has a non-empty result. `ReadOnlyDatabase` runs a model's query without trusting it, and
`execution_accuracy` compares what it returns with what the right query returns.
"""

from __future__ import annotations

import argparse
import json
import random
import sqlite3
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

ROWS = 60
PEOPLE = ("Cara Voss", "Eve Lind", "Omar Reyes", "Nina Park", "Tom Hale", "Ida Brandt")


@dataclass(frozen=True)
class Table:
    """A table: what to call a row of it, its text columns' values and its number columns' ranges."""

    name: str
    one: str
    label: str  # the column by which a row is called
    words: dict[str, tuple[str, ...]]
    numbers: dict[str, tuple[int, int]]

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns, in the order in which the prompt shows them."""
        return (self.label, *self.words, *self.numbers)


TABLES = (
    Table(
        "books",
        "book",
        "title",
        {"author": PEOPLE, "genre": ("fantasy", "crime", "poetry", "history")},
        {"price": (5, 40), "year": (1960, 2024)},
    ),
    Table(
        "films",
        "film",
        "title",
        {"director": PEOPLE, "country": ("France", "Japan", "Brazil", "Norway")},
        {"length": (75, 190), "year": (1960, 2024)},
    ),
    Table(
        "staff",
        "employee",
        "name",
        {"team": ("sales", "legal", "design", "support"), "city": ("Oslo", "Lima", "Kyoto", "Porto")},
        {"salary": (1800, 7200), "age": (20, 65)},
    ),
    Table(
        "shops",
        "shop",
        "name",
        {"kind": ("bakery", "florist", "cafe", "bookshop"), "city": ("Oslo", "Lima", "Kyoto", "Porto")},
        {"rent": (300, 2500), "rating": (1, 10)},
    ),
    Table(
        "players",
        "player",
        "name",
        {"club": ("Rovers", "United", "Athletic", "Wanderers"), "position": ("keeper", "defender", "striker")},
        {"goals": (0, 60), "age": (17, 40)},
    ),
)


@dataclass(frozen=True)
class Question:
    """A question in words about one table, and a query that answers it."""

    table: Table
    text: str
    sql: str

    @property
    def prompt(self) -> str:
        """What the model reads: the table's columns, the question, and the word `SQL:`."""
        return f"{self.table.name}({', '.join(self.table.columns)})\n{self.text}\nSQL:"


# ---------------------------------------------------------------------------------------------- the tables


def make_rows(table: Table, rng: random.Random) -> list[tuple[str | int, ...]]:
    """Fill a table with rows; labels are unique, so that a list of them says which rows were meant."""
    firsts = ("Amber", "Birch", "Cedar", "Delta", "Ember", "Frost", "Grove", "Hazel", "Indigo", "Juniper")
    seconds = ("Fox", "Gate", "Hill", "Lake", "Moon", "Stone")
    labels = [f"{first} {second}" for first in firsts for second in seconds]
    rng.shuffle(labels)
    return [
        (
            label,
            *(rng.choice(values) for values in table.words.values()),
            *(rng.randint(low, high) for low, high in table.numbers.values()),
        )
        for label in labels[:ROWS]
    ]


def make_database(path: Path, seed: int = 0) -> None:
    """Write the five tables to a new SQLite file; an older file at `path` is replaced."""
    path.unlink(missing_ok=True)
    with closing(sqlite3.connect(path)) as connection, connection:
        for table in TABLES:
            types = [f"{c} {'INTEGER' if c in table.numbers else 'TEXT'}" for c in table.columns]
            connection.execute(f"CREATE TABLE {table.name} ({', '.join(types)})")
            marks = ", ".join("?" for _ in table.columns)
            rows = make_rows(table, random.Random(f"{seed}/{table.name}"))
            connection.executemany(f"INSERT INTO {table.name} VALUES ({marks})", rows)


# ------------------------------------------------------------------------------------------- the questions


def make_condition(table: Table, column: str, rng: random.Random) -> tuple[str, str]:
    """One condition on a column, in words and in SQL."""
    if column in table.words:
        value = rng.choice(table.words[column])
        return f"{column} is {value}", f"{column} = '{value}'"
    low, high = table.numbers[column]
    value_ = rng.randint(low, high)
    word, sign = rng.choice((("above", ">"), ("below", "<")))
    return f"{column} is {word} {value_}", f"{column} {sign} {value_}"


def make_question(rng: random.Random) -> Question:
    """A question of a random kind about a random table, with one or two conditions."""
    table = rng.choice(TABLES)
    target = rng.choice(tuple(table.numbers))
    columns = [column for column in table.columns if column not in (table.label, target)]
    # In the table's order: "a and b" in training and "b and a" in the test would be the same query twice.
    chosen = sorted(rng.sample(columns, rng.randint(1, 2)), key=columns.index)
    conditions = [make_condition(table, column, rng) for column in chosen]
    words = " and ".join(condition[0] for condition in conditions)
    where = f"FROM {table.name} WHERE " + " AND ".join(condition[1] for condition in conditions)
    top = rng.randint(2, 5)
    text, sql = rng.choice(
        (
            (f"How many {table.name} are there where {words}?", f"SELECT COUNT(*) {where}"),
            (f"List the {table.label} of {table.name} where {words}.", f"SELECT {table.label} {where}"),
            (f"What is the average {target} of {table.name} where {words}?", f"SELECT AVG({target}) {where}"),
            (f"What is the highest {target} of {table.name} where {words}?", f"SELECT MAX({target}) {where}"),
            (f"What is the lowest {target} of {table.name} where {words}?", f"SELECT MIN({target}) {where}"),
            (
                f"Which {table.one} has the highest {target} where {words}?",
                f"SELECT {table.label} {where} ORDER BY {target} DESC LIMIT 1",
            ),
            (
                f"Which {top} {table.name} have the lowest {target} where {words}?",
                f"SELECT {table.label} {where} ORDER BY {target} LIMIT {top}",
            ),
        )
    )
    return Question(table, text, sql)


def make_questions(
    database: ReadOnlyDatabase, train: int, test: int, seed: int = 0
) -> tuple[list[Question], list[Question]]:
    """Draw questions with distinct queries and non-empty results, and split them into train and test."""
    rng = random.Random(seed)
    found: dict[str, Question] = {}
    while len(found) < train + test:
        question = make_question(rng)
        rows = database.run(question.sql)
        # A count of nothing is 0, an average of nothing is NULL: both are results of an empty choice of rows.
        if rows and rows[0][0] not in (0, None):
            found.setdefault(question.sql, question)
    questions = list(found.values())
    return questions[:train], questions[train:]


# ----------------------------------------------------------------------------------------------- the judge


class ReadOnlyDatabase:
    """An SQLite file on which queries from an untrusted source are run.

    The file is opened read-only; a statement may do nothing but read tables with common functions (so that
    `ATTACH`, `PRAGMA` or a function that builds a gigabyte is refused before it starts); it is stopped after
    `seconds`; and a result of more than `max_rows` rows is refused.
    """

    ACTIONS = frozenset((sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION))
    FUNCTIONS = frozenset(
        ("count", "avg", "sum", "total", "min", "max", "round", "abs", "lower", "upper", "length", "like", "coalesce")
    )

    def __init__(self, path: Path, seconds: float = 1.0, max_rows: int = 1000) -> None:
        self.seconds = seconds
        self.max_rows = max_rows
        self.connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        self.connection.execute("PRAGMA query_only = ON")
        self.connection.set_authorizer(self._authorize)
        self.connection.set_progress_handler(lambda: time.monotonic() > self._deadline, 1000)
        self._deadline = 0.0

    def _authorize(self, action: int, _: str | None, name: str | None, *__: str | None) -> int:
        refused = action == sqlite3.SQLITE_FUNCTION and (name or "").lower() not in self.FUNCTIONS
        return sqlite3.SQLITE_DENY if refused or action not in self.ACTIONS else sqlite3.SQLITE_OK

    def run(self, sql: str) -> list[tuple] | None:
        """Run one query; `None` if it is not valid, not allowed, too slow or returns too much."""
        self._deadline = time.monotonic() + self.seconds
        try:
            with closing(self.connection.execute(sql)) as cursor:
                if cursor.description is None:  # no query at all, but white space or a comment
                    return None
                rows = cursor.fetchmany(self.max_rows + 1)
        # Two statements in one string are an sqlite3.Warning in Python 3.10; a NUL character is a ValueError.
        except (sqlite3.Error, sqlite3.Warning, ValueError):
            return None
        return rows if len(rows) <= self.max_rows else None

    def close(self) -> None:
        """Close the file."""
        self.connection.close()


def same_result(gold_sql: str, gold: list[tuple], rows: list[tuple] | None) -> bool:
    """Whether two results are equal: as lists if the right query asks for an order, else as bags of rows."""
    if rows is None:
        return False

    def tidy(result: list[tuple]) -> list[tuple]:
        # Sums in another order differ in the last digits.
        return [tuple(round(v, 6) if isinstance(v, float) else v for v in row) for row in result]

    if "ORDER BY" in gold_sql:
        return tidy(rows) == tidy(gold)
    return Counter(tidy(rows)) == Counter(tidy(gold))


@dataclass(frozen=True)
class Score:
    """Shares of a list of predicted queries, each from 0 to 1."""

    execution: float  # returns what the right query returns
    exact: float  # is the right query, character by character
    valid: float  # runs at all


def execution_accuracy(database: ReadOnlyDatabase, gold: Sequence[str], predicted: Sequence[str]) -> Score:
    """Execute every predicted query and compare its result with that of the right one."""
    if not gold or len(gold) != len(predicted):
        raise ValueError(f"{len(gold)} right queries and {len(predicted)} predicted ones: give as many, not none")
    right = valid = 0
    for expected, sql in zip(gold, predicted, strict=True):
        gold_rows = database.run(expected)
        if gold_rows is None:
            raise ValueError(f"the right query does not run on this database: {expected}")
        rows = database.run(sql)
        valid += rows is not None
        right += same_result(expected, gold_rows, rows)
    exact = sum(a == b for a, b in zip(gold, predicted, strict=True))
    return Score(right / len(gold), exact / len(gold), valid / len(gold))


# ------------------------------------------------------------------------------------------- the data files


def write_data(out: Path, train: int = 256, test: int = 64, seed: int = 0) -> None:
    """Write `tables.sqlite`, `train.jsonl` and `test.jsonl` to the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    make_database(out / "tables.sqlite", seed)
    with closing(ReadOnlyDatabase(out / "tables.sqlite")) as database:
        splits = dict(zip(("train", "test"), make_questions(database, train, test, seed), strict=True))
    for name, questions in splits.items():
        lines = (json.dumps({"prompt": q.prompt, "answer": q.sql}) + "\n" for q in questions)
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Write the data files, as the command line says."""
    parser = argparse.ArgumentParser(description="Write training and test questions and their database.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--train", type=int, default=256, help="training questions (default: 256)")
    parser.add_argument("--test", type=int, default=64, help="test questions (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of tables and questions (default: 0)")
    args = parser.parse_args()
    write_data(args.out, args.train, args.test, args.seed)
    print(f"{args.out}: {args.train} training and {args.test} test questions, tables.sqlite")


if __name__ == "__main__":
    main()
