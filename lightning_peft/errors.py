"""The one exception type for what a user gave us and can mend, and what messages have in common."""

import difflib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_SHOWN = 5
_LONGEST = 100


class PEFTError(ValueError):
    """Wrong input: the message says what was given, what was expected and what to do.

    The command line prints the message of this type alone, without a traceback.
    """


class NotFiniteError(PEFTError):
    """An adapter holds NaN or infinity: the run that trained it has diverged."""


class StateError(PEFTError, RuntimeError):
    """A state does not have a module's tensors. What catches torch's own error for that catches this one too."""


def shown(value: Any) -> str:
    """Return how ``value`` is written in code, for a message, of which a long one is cut off."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def listed(names: Iterable[str]) -> str:
    """Return the first few of ``names`` for a message, and how many more there are."""
    names = list(names)
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def near(name: str, names: Iterable[str]) -> str:
    """Return a question for a message, with a space behind it, if ``name`` is almost one of ``names``."""
    plain = {known.lower(): known for known in names}
    found = difflib.get_close_matches(name.lower(), plain, n=1)
    return f"Did you mean {plain[found[0]]!r}? " if found else ""


def refuse_arguments(kind: type, args: Sequence[Any], given: Mapping[str, Any], others: Mapping[str, str]) -> None:
    """Check that ``kind`` can be made of these arguments.

    Args:
        kind: A class.
        args: Arguments by position.
        given: Arguments by name.
        others: What to write, for names of other tools; with ``{}`` for the value.

    Raises:
        PEFTError: An argument has no name, or a name that ``kind`` does not know.
    """
    signature = inspect.signature(kind.__init__)  # type: ignore[misc]
    try:
        signature.bind(None, *args, **given)
    except TypeError as error:
        known = [name for name in signature.parameters if name != "self"]
        unknown = next((name for name in given if name not in known), None)
        if unknown is None:
            call = ", ".join(f"{name}={value!r}" for name, value in zip(known, args, strict=False))
            raise PEFTError(f"{kind.__name__}: {error}. Write arguments by name: {kind.__name__}({call}).") from None
        instead = (
            f"Write {others[unknown].format(repr(given[unknown]))}. " if unknown in others else near(unknown, known)
        )
        raise PEFTError(f"{kind.__name__} has no {unknown!r}. {instead}It has {', '.join(known)}.") from None
