"""Dialogues in which two people agree on a place, a day and an hour, after some of it was changed; and a summary."""

from __future__ import annotations

import random

NAMES = ("Cara", "Eve", "Omar", "Nina", "Tom", "Ida", "Paul", "Rosa")
PLACES = ("cinema", "cafe", "museum", "market", "park", "library")
DAYS = ("Monday", "Tuesday", "Friday", "Saturday", "Sunday")


def make_dialogue(rng: random.Random) -> dict[str, str]:
    """Return a dialogue and its summary."""
    first, second = rng.sample(NAMES, 2)
    (day, better), (place, nicer) = rng.sample(DAYS, 2), rng.sample(PLACES, 2)
    hour, later = rng.sample(range(1, 12), 2)
    turns = [f"{first}: Shall we go to the {place} on {day}?"]
    if rng.random() < 0.5:
        turns += [f"{second}: {day} is bad. What about {better}?", f"{first}: {better} is fine."]
        day = better
    if rng.random() < 0.5:
        turns += [f"{second}: I would rather go to the {nicer}.", f"{first}: Then the {nicer}."]
        place = nicer
    turns.append(f"{second}: Can we meet at {hour}?")
    if rng.random() < 0.5:
        turns.append(f"{first}: Better at {later}.")
        hour = later
    turns.append(f"{rng.choice((first, second))}: See you then!")
    return {"dialogue": "\n".join(turns), "summary": f"{first} and {second} go to the {place} on {day} at {hour}."}
