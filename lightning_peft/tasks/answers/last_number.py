"""The metric of arithmetic problems: whether the last number of an answer is the right one.

LLM-Adapters: An Adapter Family for Parameter-Efficient Fine-Tuning of Large Language Models (Hu et al., 2023),
arXiv:2304.01933: the answer is the last number in the text, and is right within 0.001.
"""

from __future__ import annotations

import re

from lightning_peft.tasks.answers.share_right import ShareRight

# A minus between two numbers subtracts; commas part thousands.
NUMBER = re.compile(r"(?<![0-9.)\]])-?[0-9][0-9,]*(?:\.[0-9]+)?|(?<=[0-9)\]]-)[0-9][0-9,]*(?:\.[0-9]+)?")
TOLERANCE = 1e-3


def last_number(text: str) -> float | None:
    """Return the last number of a text, such as 1234.5 of "$1,234.5 in all"."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


class LastNumber(ShareRight):
    """The share of answers whose last number is that of the expected answer."""

    def right(self, answer: str, expected: str) -> bool:
        """Whether the last numbers of two texts are the same within 0.001."""
        given, wanted = last_number(answer), last_number(expected)
        return given is not None and wanted is not None and (given == wanted or abs(given - wanted) <= TOLERANCE)

    def unfit(self, expected: str) -> str | None:
        """Return why nothing can be judged by an expected answer, or `None` if something can."""
        return None if last_number(expected) is not None else "expected one that holds a number"
