"""What an interrupt must not leave half done."""

from __future__ import annotations

from collections.abc import Callable


def to_the_end(act: Callable[[], None]) -> None:
    """Call ``act``, which may be called twice; if Ctrl-C or a lack of memory ends it, do so before that goes on."""
    try:
        act()
    except BaseException:
        act()
        raise
