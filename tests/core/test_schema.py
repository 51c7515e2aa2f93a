"""Values from files against the types that were declared."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest

from lightning_peft import PEFTError
from lightning_peft.core.schema import check_values, fits

GOOD: list[tuple[Any, Any]] = [
    (1, int),
    (2**63 - 1, int),
    (-(2**63) + 1, int),
    (0.5, float),
    (1, float),
    (3e38, float),
    ("a", str),
    (True, bool),
    (None, None),
    (None, int | None),
    (1, int | None),
    ("x", Literal["x", "y"]),
    ([1, 2], list[int]),
    ((1, 2), Sequence[int]),
    ({1}, Sequence[int]),
    ({"a": [1]}, dict[str, list[int]]),
    ({"a": 1.0}, Mapping[str, float]),
    (object(), complex),
]
BAD: list[tuple[Any, Any]] = [
    (True, int),
    (1.0, int),
    ("1", int),
    (2**63, int),
    (-(2**63), int),
    (False, float),
    (math.nan, float),
    (math.inf, float),
    (2.0**128, float),
    (-(2.0**128), float),
    (2**63, float),
    ("0.5", float),
    (1, str),
    (1, bool),
    (0, None),
    ("x", int | None),
    ("z", Literal["x", "y"]),
    (["x"], Literal["x", "y"]),
    ([1, "2"], list[int]),
    ("ab", list[str]),
    (1, list[int]),
    ({"a": ["1"]}, dict[str, list[int]]),
    ({1: [1]}, dict[str, list[int]]),
    ([("a", 1.0)], Mapping[str, float]),
]


@pytest.mark.parametrize(("value", "hint"), GOOD)
def test_values_of_a_type_fit(value: Any, hint: Any) -> None:
    assert fits(value, hint)


@pytest.mark.parametrize(("value", "hint"), BAD)
def test_values_of_another_do_not(value: Any, hint: Any) -> None:
    assert not fits(value, hint)


@pytest.mark.parametrize(
    ("value", "hint", "words"),
    [
        ("x", int, "it has r='x'; int was expected."),
        (2.5, int | None, "it has r=2.5; int was expected."),
        ([1], str | list[str], r"it has r=[1]; str or list[str] was expected."),
        ("a" * 98, int, f"it has r='{'a' * 98}'; int was expected."),
        ("a" * 99, int, f"it has r='{'a' * 99}…; int was expected."),
    ],
)
def test_the_error_says_what_was_given_and_expected(value: Any, hint: Any, words: str) -> None:
    with pytest.raises(PEFTError) as refusal:
        check_values({"other": object(), "r": value}, {"r": hint}, "it")
    assert str(refusal.value) == words
