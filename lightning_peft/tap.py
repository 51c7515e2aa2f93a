"""What a module was called with, kept for an adapter on another one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_peft.adapter import Adapter
from lightning_peft.calls import input_of


class Tap(Adapter):
    """Keeps the hidden state that its host was last given, and what it returned."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: tuple[Tensor, Any] | None = None

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Keep input and output."""
        self._seen = input_of(args, kwargs), output
        return output

    def take(self) -> tuple[Tensor, Any] | None:
        """Return the host's last input and output, if it ran, and forget them."""
        seen, self._seen = self._seen, None
        return seen

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": None}
