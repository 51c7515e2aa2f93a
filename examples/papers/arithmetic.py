"""Arithmetic word problems of two steps, with their working and, behind `####`, the answer."""

from __future__ import annotations

import random

NAMES = ("Cara", "Eve", "Omar", "Nina", "Tom", "Ida", "Paul", "Rosa")
THINGS = ("apples", "books", "coins", "stamps", "pens", "shells")


def make_problem(rng: random.Random) -> dict[str, str]:
    """Return a question and its answer; all numbers are from 0 to 39."""
    name, other = rng.sample(NAMES, 2)
    thing, start = rng.choice(THINGS), rng.randint(4, 15)
    sentences, working, now = [f"{name} has {start} {thing}."], [], start
    for _ in range(2):
        kind = rng.choice(["buys", *(["gives"] if now > 1 else []), *(["finds"] if now < 16 else [])])
        if kind == "buys":
            number = rng.randint(1, 9)
            sentences.append(f"{name} buys {number} more.")
            after, step = now + number, f"{now} + {number}"
        elif kind == "gives":
            number = rng.randint(1, min(9, now - 1))
            sentences.append(f"{name} gives {number} to {other}.")
            after, step = now - number, f"{now} - {number}"
        else:
            sentences.append(f"Then {name} finds as many as are there.")
            after, step = 2 * now, f"{now} + {now}"
        working.append(f"{step} = {after}.")
        now = after
    question = f"{' '.join(sentences)} How many {thing} does {name} have?"
    return {"question": question, "answer": f"{' '.join(working)}\n#### {now}"}
