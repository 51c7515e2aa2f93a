"""The data of the papers' experiments, made up here from a seed: nothing is downloaded.

    python examples/papers/make_data.py --out runs/papers/data

writes the folders `sql`, `entailment`, `entailment_pairs`, `dialogues` and `arithmetic`, each with `train.jsonl`,
`val.jsonl` and `test.jsonl`, and `train_100.jsonl` and others with the first examples of `train.jsonl`. No example
occurs twice in a folder. `sql` is that of `examples/text_to_sql.py`, with its database.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from arithmetic import make_problem
from dialogues import make_dialogue
from entailment import as_question, make_pair

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from text_to_sql import ReadOnlyDatabase, make_database, make_questions

Example = dict[str, str]
TASKS: dict[str, Callable[[random.Random], Example]] = {
    "entailment": lambda rng: as_question(make_pair(rng)),
    "entailment_pairs": make_pair,
    "dialogues": make_dialogue,
    "arithmetic": make_problem,
}
PARTS = (100, 1000)
"""Numbers of training examples, for runs on few."""


def distinct(make: Callable[[random.Random], Example], number: int, seed: int) -> list[Example]:
    """Return examples that differ, in the order in which they were drawn."""
    rng, found = random.Random(seed), {}
    while len(found) < number:
        example = make(rng)
        found.setdefault(json.dumps(example), example)
    return list(found.values())


def sql(out: Path, number: int, seed: int) -> list[Example]:
    """Return questions about tables, and write the tables."""
    make_database(out / "tables.sqlite", seed)
    with closing(ReadOnlyDatabase(out / "tables.sqlite")) as database:
        questions, _ = make_questions(database, number, 0, seed)
    return [{"prompt": question.prompt, "answer": question.sql} for question in questions]


def write(out: Path, examples: list[Example], train: int, held_out: int) -> None:
    """Write the files of a task; the examples that are held out are the first, whatever the number to train on."""
    val, test, rest = examples[:held_out], examples[held_out : 2 * held_out], examples[2 * held_out :]
    files = {"val": val, "test": test, "train": rest}
    files |= {f"train_{part}": rest[:part] for part in PARTS if part < train}
    for name, rows in files.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_all(out: Path, train: int, held_out: int, seed: int) -> None:
    """Write the files of all tasks."""
    for name in ("sql", *TASKS):
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        number = train + 2 * held_out
        made = sql(folder, number, seed) if name == "sql" else distinct(TASKS[name], number, seed)
        write(folder, made, train, held_out)


def main() -> None:
    """Write the data files, as the command line says."""
    parser = argparse.ArgumentParser(description="Write the data of the papers' experiments.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--train", type=int, default=10_000, help="training examples of each task (default: 10000)")
    parser.add_argument("--held-out", type=int, default=256, help="validation and test examples each (default: 256)")
    parser.add_argument("--seed", type=int, default=0, help="of everything (default: 0)")
    args = parser.parse_args()
    make_all(args.out, args.train, args.held_out, args.seed)
    print(f"{args.out}: {args.train} training examples of {', '.join(('sql', *TASKS))}")


if __name__ == "__main__":
    main()
