"""The one exception type for what a user gave us and can mend, and how messages list names."""

from collections.abc import Iterable

_SHOWN = 5


class PEFTError(ValueError):
    """Wrong input: the message says what was given, what was expected and what to do.

    The command line prints the message of this type alone, without a traceback.
    """


class NotFiniteError(PEFTError):
    """An adapter holds NaN or infinity: the run that trained it has diverged."""


def listed(names: Iterable[str]) -> str:
    """Return the first few of ``names`` for a message, and how many more there are."""
    names = list(names)
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
