"""Values from files against the types that were declared for them, before anything is made of them."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lightning_peft.errors import PEFTError, shown

_LARGEST = 2**63
"""No whole number of a configuration is as large."""
_LARGEST_FLOAT = 2.0**128
"""No other number is: from here on float32 has none, and torch refuses to multiply by it."""


def check_values(values: Mapping[str, Any], hints: Mapping[str, Any], what: str) -> None:
    """Check that every value that has a type has it.

    Args:
        values: By name.
        hints: The types that are known, by name: those of JSON, in unions, lists, dictionaries and literals.
        what: What the values are of, for the error.

    Raises:
        PEFTError: One has another type, or is a number that is not finite, or too large.
    """
    for name, value in values.items():
        if name in hints and not fits(value, hints[name]):
            raise PEFTError(f"{what} has {name}={shown(value)}; {_words(hints[name])} was expected.")


def hints_of(kind: type) -> Mapping[str, Any]:
    """Return the types of the fields of a class."""
    return get_type_hints(kind)


def fits(value: Any, hint: Any) -> bool:
    """Whether ``value`` is of the type ``hint``; of one that is not known here, everything is."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is Literal:
        return isinstance(value, str | int | bool | None) and value in parts
    if origin in (list, Sequence, Iterable):
        return isinstance(value, list | tuple | set | frozenset) and all(fits(entry, parts[0]) for entry in value)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(fits(k, parts[0]) and fits(v, parts[1]) for k, v in value.items())
    return _is(value, hint)


def is_json(value: Any, depth: int = 20) -> bool:
    """Whether ``value`` is what JSON can hold: text, numbers, lists and dictionaries, and no deeper."""
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        return depth > 0 and all(is_json(entry, depth - 1) for entry in value)
    return value is None or isinstance(value, str | Real)


def _is(value: Any, kind: Any) -> bool:
    if kind in (None, type(None)):
        return value is None
    if kind is bool or kind is str:
        return isinstance(value, kind)
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool) and abs(int(value)) < _LARGEST
    if kind is float:
        if not isinstance(value, Real) or isinstance(value, bool):
            return False
        return abs(int(value)) < _LARGEST if isinstance(value, Integral) else abs(float(value)) < _LARGEST_FLOAT
    return True


def _words(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_words(part) for part in get_args(hint) if part is not type(None))
    return getattr(hint, "__name__", str(hint)) if not get_args(hint) else str(hint).replace("typing.", "")
