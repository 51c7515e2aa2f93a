"""The text that the small base model has read: of the words of the tasks in `make_data.py`, in other forms.

Tables are told in sentences, queries stand below a comment, rules come with what follows from them,
sums stand alone or are asked for, dialogues have no summary, and summaries no dialogue. So every token of the tasks is
known: what is trained beside a frozen output layer could hardly bring about one that was never seen.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

from arithmetic import THINGS
from dialogues import make_dialogue
from entailment import ACTS, CITIES, JOBS, NAMES
from facts import FIRST, KINDS, SECOND, sentence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from text_to_sql import TABLES, make_rows


def told(rng: random.Random) -> str:
    """A row of a table in sentences."""
    table = rng.choice(TABLES)
    row = dict(zip(table.columns, rng.choice(make_rows(table, rng)), strict=True))
    facts = [f"{column} is {value}" for column, value in row.items() if column != table.label]
    rng.shuffle(facts)
    return f"{table.name}({', '.join(table.columns)}). {row[table.label]} is a {table.one}: {' and '.join(facts)}."


def queried(rng: random.Random) -> str:
    """A query below a comment."""
    table = rng.choice(TABLES)
    row = dict(zip(table.columns, rng.choice(make_rows(table, rng)), strict=True))
    columns = rng.sample([c for c in table.columns if c != table.label], rng.choice((1, 1, 2)))
    conditions = [_condition(table.numbers, column, row[column], rng) for column in columns]
    meant, where = (" and ".join(parts) for parts in zip(*conditions, strict=True))
    number = rng.choice(tuple(table.numbers))
    what, query = rng.choice(
        (
            ("count them", "count(*)"),
            (f"their {table.label}", table.label),
            (f"mean {number}", f"avg({number})"),
            (f"greatest {number}", f"max({number})"),
            (f"least {number}", f"min({number})"),
        )
    )
    order, direction = rng.choice(("", f" order by {number}")), rng.choice(("", " desc"))
    end = f"{order}{direction} limit {rng.randint(1, 5)}" if order else ""
    sql = f"select {query} from {table.name} where {where}"
    return f"-- {table.name} with {meant}, {what}{end}{rng.choice(chr(10) + ' ')}{_cased(sql + end, rng)};"


def _condition(numbers: Collection[str], column: str, value: str | int, rng: random.Random) -> tuple[str, str]:
    """A condition on a column, as it is said and in SQL."""
    if column not in numbers:
        return f"{column} {value}", f"{column} = '{value}'"
    word, sign = rng.choice((("over", ">"), ("under", "<")))
    return f"{column} {word} {value}", f"{column} {sign} {value}"


def _cased(sql: str, rng: random.Random) -> str:
    """A query in lower case, or with the words of the language in capitals."""
    if rng.random() < 0.5:
        return sql
    return re.sub(
        r"\b(select|from|where|order by|desc|limit|count|avg|max|min|and)\b", lambda word: word[0].upper(), sql
    )


def concluded(rng: random.Random) -> str:
    """A rule, somebody to whom it applies or not, and what follows."""
    name, job, city, act = rng.choice(NAMES), rng.choice(JOBS), rng.choice(CITIES), rng.choice(ACTS)
    their_job, their_city = (
        rng.choice(values) if rng.random() < 0.3 else v for values, v in ((JOBS, job), (CITIES, city))
    )
    quantifier = rng.choice(("Every", "No", "Some"))
    met = (their_job, their_city) == (job, city) and quantifier != "Some"
    follows = (f"{name} {act[0]}" if quantifier == "Every" else f"{name} does not {act[1]}") if met else "who knows"
    return f"{quantifier} {job} in {city} {act[0]}. {name} is a {their_job} in {their_city}, so {follows}."


def summed(rng: random.Random) -> str:
    """A few sums."""
    sums = []
    for _ in range(4):
        a, b = rng.randint(1, 30), rng.randint(1, 15)
        sums.append(rng.choice((f"{a} + {b} = {a + b}.", f"{a + b} - {b} = {a}.", f"{a} {rng.choice(THINGS)}.")))
    return " ".join(sums)


def judged(rng: random.Random) -> str:
    """A sum that is right or wrong, and a question that nobody can answer."""
    a, b, name = rng.randint(1, 20), rng.randint(1, 9), rng.choice(NAMES)
    claimed = a + b + rng.choice((0, 0, 1, -1))
    if rng.random() < 0.3:
        return f"Is it true that {name} has {a} {rng.choice(THINGS)}?\nAnswer: maybe"
    return f"Is it true that {a} + {b} = {claimed}?\nAnswer: {'yes' if claimed == a + b else 'no'}\n#### {a + b}"


def wondered(rng: random.Random) -> str:
    """Somebody who does something, and asks."""
    name, done = rng.choice(NAMES), rng.choice(("buys more", "gives some", "finds as many as are there", "has more"))
    asked = ("How many have it?", "What is the highest?", "What is the lowest?", "Which are above?", "Which is below?")
    more = ("Tell me which.", "List them where they are.", "What is the average?", "How many are there?", "I need it.")
    return f"Then {name} {done}. {name} asks: {rng.choice(asked)} {rng.choice(more)}"


def spoken(rng: random.Random) -> str:
    """A dialogue, and where one of them went; or what others do."""
    made, other = make_dialogue(rng), make_dialogue(rng)
    words = made["summary"].split()
    if rng.random() < 0.3:
        return other["summary"]
    return f"{made['dialogue']}\nSo {words[2]} went to the {words[6]} on {words[8]}."


def noted(rng: random.Random) -> str:
    """A few facts about places."""
    facts = [
        (rng.choice(KINDS), f"{rng.choice(FIRST)} {rng.choice(SECOND)}", str(rng.randint(100, 999))) for _ in "123"
    ]
    return " ".join(sentence(fact) for fact in [*facts, rng.choice(facts)])


TEXTS = (told, queried, concluded, summed, judged, wondered, spoken, noted)


def texts(seed: int) -> Iterator[str]:
    """Text without end."""
    rng = random.Random(f"base/{seed}")
    while True:
        yield rng.choice(TEXTS)(rng)
