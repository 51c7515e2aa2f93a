"""Small private data: facts about invented places, to be learned by heart, or to be looked up and read.

Each fact can be asked for in five ways; the last two are kept for validation and test. `heart` has one way of asking
for each fact, `rephrased` three. `reading` shows how to answer from a sentence that is given, about other places than
the test's; a test question is then given the sentence that shares most words with it, as a retrieval would.
"""

from __future__ import annotations

import random

FIRST = ("Birch", "Cedar", "Amber", "Stone", "Hazel", "Frost", "Juniper", "Grove")
SECOND = ("Library", "Hall", "Museum", "Market", "Park", "Cafe")
KINDS = ("room", "desk", "code")
WAYS = (
    "What is the {kind} of the {place}?",
    "Tell me the {kind} of the {place}.",
    "The {place} has which {kind}?",
    "I need the {kind} for the {place}.",
    "Which {kind} does the {place} have?",
)
LEARNED = 3
"""Ways that are trained on; of the others one is for validation, one for the test."""
Example = dict[str, str]
Fact = tuple[str, str, str]


def sentence(fact: Fact) -> str:
    """A fact as it would stand in a document."""
    kind, place, number = fact
    return f"The {kind} of the {place} is {number}."


def asked(fact: Fact, way: int, known: str = "") -> Example:
    """A question about a fact, below what is known, if something is."""
    kind, place, number = fact
    question = WAYS[way].format(kind=kind, place=place)
    return {"prompt": f"{known}{question}\nAnswer:", "answer": number}


def found(question: str, facts: list[Fact]) -> str:
    """The sentence that shares most words with a question."""
    words = set(question.rstrip("?.").split())
    return max(map(sentence, facts), key=lambda text: len(words & set(text.rstrip(".").split())))


def make_facts(seed: int) -> dict[str, list[Example]]:
    """Return the examples of each file: ways of training, and questions without and with a sentence."""
    rng = random.Random(seed)
    places = [f"{first} {second}" for first in FIRST for second in SECOND]
    rng.shuffle(places)
    facts = [(kind, place, str(rng.randint(100, 999))) for place in places for kind in KINDS]
    private, others = facts[:48], facts[48:]
    reading = [asked(fact, way, f"{sentence(fact)}\n") for fact in others for way in range(LEARNED)]
    heart = [asked(fact, 0) for fact in private]
    rephrased = [asked(fact, way) for fact in private for way in range(LEARNED)]
    files = {"heart": heart, "rephrased": rephrased, "reading": reading}
    for rows in files.values():
        rng.shuffle(rows)
    for way, name in ((LEARNED, "val"), (LEARNED + 1, "test")):
        files[name] = [asked(fact, way) for fact in private]
        files[f"{name}_looked_up"] = [
            asked(fact, way, f"{found(WAYS[way].format(kind=fact[0], place=fact[1]), private)}\n") for fact in private
        ]
    return files
