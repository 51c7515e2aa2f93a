"""The data of the papers' experiments, made up here from a seed: nothing is downloaded.

    python examples/papers/make_data.py --out runs/papers/data

writes the folders `sql`, `entailment`, `entailment_pairs`, `dialogues` and `arithmetic`, each with `train.jsonl`,
`val.jsonl` and `test.jsonl`; no example occurs twice in a folder. `sql` is that of `examples/text_to_sql.py`, with its
database, `facts` that of `facts.py`. `text.jsonl` is text of the kind that `base_model.py` learns, to see what a base
forgets.
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
from base_text import texts
from dialogues import make_dialogue
from entailment import as_question, make_pair
from facts import make_facts

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from text_to_sql import ReadOnlyDatabase, make_database, make_questions

Example = dict[str, str]
TASKS: dict[str, Callable[[random.Random], Example]] = {
    "entailment": lambda rng: as_question(make_pair(rng)),
    "entailment_pairs": make_pair,
    "dialogues": make_dialogue,
    "arithmetic": make_problem,
}


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


def write(path: Path, rows: list[Example]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def split(out: Path, examples: list[Example], held_out: int) -> None:
    """Write the files of a task; the examples that are held out are the first, whatever the number to train on."""
    write(out / "val.jsonl", examples[:held_out])
    write(out / "test.jsonl", examples[held_out : 2 * held_out])
    write(out / "train.jsonl", examples[2 * held_out :])


def make_all(out: Path, train: int, held_out: int, seed: int) -> None:
    """Write the files of all tasks."""
    for name in ("sql", *TASKS):
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        number = train + 2 * held_out
        made = sql(folder, number, seed) if name == "sql" else distinct(TASKS[name], number, seed)
        split(folder, made, held_out)
    (out / "facts").mkdir(exist_ok=True)
    for name, rows in make_facts(seed).items():
        write(out / "facts" / f"{name}.jsonl", rows)
    source = texts(seed + 2)  # the base has seen those of the seeds before
    write(out / "text.jsonl", [{"text": next(source)} for _ in range(held_out)])


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
