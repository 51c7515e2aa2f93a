"""What belongs to the thread that calls a model, and not to the model."""

from __future__ import annotations

import threading
from typing import Any


class OfThread(threading.local):
    """A value that every thread has for itself, ``None`` at first. A copy of it has none."""

    def __init__(self) -> None:
        self.value: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()
