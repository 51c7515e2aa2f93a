"""What is computed from tensors once, and used until one of them changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from torch import Tensor


class Kept:
    """The last that :meth:`get` made."""

    def __init__(self) -> None:
        self._state: object = None
        self._sources: list[Tensor] = []
        self._made: list[Tensor] = []

    def get(self, key: Hashable, sources: Sequence[Tensor], make: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Return what ``make`` makes of ``sources``; anew with other values or memory of these, or another ``key``."""
        if any(source.is_inference() for source in sources):
            # These do not tell when they are changed.
            return make()
        state = (key, [source._version for source in sources], [source.data_ptr() for source in sources])
        if state != self._state:
            # Held, their memory cannot become another tensor's, which would be taken for them.
            self._state, self._sources, self._made = state, [source.detach() for source in sources], make()
        return self._made
