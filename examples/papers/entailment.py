"""Pairs of texts with one of three labels: does the second follow from the first, contradict it, or neither?

A premise says something of all, none or some who have a job in a city, and who somebody is; a hypothesis says what that
person does. Neither text alone tells the label.
"""

from __future__ import annotations

import random
from typing import TypeVar

T = TypeVar("T")
NAMES = ("Cara", "Eve", "Omar", "Nina", "Tom", "Ida", "Paul", "Rosa")
JOBS = ("baker", "nurse", "pilot", "farmer", "lawyer", "painter")
CITIES = ("Oslo", "Lima", "Kyoto", "Porto")
ACTS = (
    ("plays chess", "play chess"),
    ("sings", "sing"),
    ("swims", "swim"),
    ("cooks", "cook"),
    ("rides", "ride"),
    ("climbs", "climb"),
)
LABELS = ("entailment", "neutral", "contradiction")
WORDS = {"entailment": "yes", "neutral": "maybe", "contradiction": "no"}
"""What a language model answers."""


def make_pair(rng: random.Random) -> dict[str, str]:
    """Return a premise, a hypothesis and a label, each label as likely as the others."""
    name, job, city, act = rng.choice(NAMES), rng.choice(JOBS), rng.choice(CITIES), rng.choice(ACTS)
    label, negated, quantifier = rng.choice(LABELS), rng.random() < 0.5, rng.choice(("Every", "No"))
    their_job, their_city, their_act = job, city, act
    if label == "neutral":
        lacking = rng.choice(("all", "job", "city", "act"))
        quantifier = "Some" if lacking == "all" else quantifier
        their_job = _other(JOBS, job, rng) if lacking == "job" else job
        their_city = _other(CITIES, city, rng) if lacking == "city" else city
        their_act = _other(ACTS, act, rng) if lacking == "act" else act
    else:
        negated = (quantifier == "No") == (label == "entailment")
    premise = f"{quantifier} {job} in {city} {act[0]}. {name} is a {their_job} in {their_city}."
    hypothesis = f"{name} does not {their_act[1]}." if negated else f"{name} {their_act[0]}."
    return {"premise": premise, "hypothesis": hypothesis, "label": label}


def as_question(pair: dict[str, str]) -> dict[str, str]:
    """Return a pair as a prompt and an answer, for language models."""
    prompt = f"{pair['premise']}\nIs it true that {pair['hypothesis'][:-1]}?\nAnswer:"
    return {"prompt": prompt, "answer": WORDS[pair["label"]]}


def _other(values: tuple[T, ...], value: T, rng: random.Random) -> T:
    return rng.choice([other for other in values if other != value])
