"""What a module was called with, kept for an adapter on another one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_peft.core.adapter import Adapter
from lightning_peft.core.calls import input_of


class Call(NamedTuple):
    """What a module was called with."""

    input: Tensor
    output: Any
    with_graph: bool
    """Whether autograd was on."""


class Tap(Adapter):
    """Keeps the last call of its host."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: Call | None = None

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Keep the hidden state that the host was given, and what it returned."""
        self._seen = Call(input_of(args, kwargs), output, torch.is_grad_enabled())
        return output

    def take(self) -> Call | None:
        """Return the host's last call, if it ran, and forget it."""
        seen, self._seen = self._seen, None
        return seen

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": None}
