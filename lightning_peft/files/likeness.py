"""The state that a checkpoint has of a part of a run, against the state that the part has now."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from lightning_peft.errors import PEFTError, shown

_LARGEST = 2**63
"""No count is as large, and torch takes no whole number that is."""


def refuse_unlike(saved: Any, present: Any, what: str, whole: bool = False) -> None:
    """Check that a saved state has values of the kinds that the present one has, wherever both have one.

    Whoever loads a state takes what it finds: what is of another kind would end in an error of any type, perhaps steps
    later, or in a run that goes on from somewhere else.

    Args:
        saved: What a checkpoint has.
        present: What there is now. Of kinds that are not known here everything may be saved, and in place of ``None``.
            A number may be a tensor of one.
        what: What it is the state of, for the error.
        whole: Whether everything that is there now has to be in what was saved, and be there: else ``None`` may have
            been saved of anything.

    Raises:
        PEFTError: Something has another kind, or is missing.
    """
    if saved is None and not whole:
        return
    for kind, is_one, expected in _KINDS:
        if _is_number(present) if kind is Real else isinstance(present, kind):
            if not is_one(saved):
                found = f"a tensor of shape {tuple(saved.shape)}" if isinstance(saved, Tensor) else shown(saved)
                raise _damaged(what, f"it is {found}, and {expected} was expected")
            break
    if isinstance(present, Mapping):
        if whole and (missing := [key for key in present if key not in saved]):
            raise _damaged(what, f"it lacks {missing[0]!r}")
        for key in [key for key in present if key in saved]:
            refuse_unlike(saved[key], present[key], f"{what}, {key!r}", whole)
    elif isinstance(present, list | tuple):
        for number, (one, other) in enumerate(zip(saved, present, strict=False)):
            refuse_unlike(one, other, f"{what}, entry {number}", whole)


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.dim()
    return isinstance(value, Real) and (not isinstance(value, int) or abs(value) < _LARGEST)


_KINDS: Sequence[tuple[Any, Callable[[Any], bool], str]] = (
    (Mapping, lambda saved: isinstance(saved, Mapping), "a mapping"),
    (list | tuple, lambda saved: isinstance(saved, list | tuple), "a list"),
    (str, lambda saved: isinstance(saved, str), "text"),
    (Real, _is_number, "a number"),
    (Tensor, lambda saved: isinstance(saved, Tensor), "a tensor"),
)


def _damaged(what: str, why: str) -> PEFTError:
    return PEFTError(f"The checkpoint's state of {what} is damaged: {why}. Take another checkpoint.")
