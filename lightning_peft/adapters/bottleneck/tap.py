"""What a module was called with, kept for an adapter on another one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_peft.core.adapter import Adapter
from lightning_peft.core.calls import input_of
from lightning_peft.core.of_thread import OfThread


class Call(NamedTuple):
    """What a module was called with."""

    input: Tensor
    output: Any
    with_graph: bool
    """Whether autograd was on."""


class Tap(Adapter):
    """Keeps the last call of its host, for each thread its own."""

    def __init__(self) -> None:
        super().__init__()
        self._seen = OfThread()
        self._traced: Call | None = None
        """The same in programs of torch.compile, where a tensor that a thread keeps is another when it is taken."""

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Keep the hidden state that the host was given, and what it returned."""
        call = Call(input_of(args, kwargs), output, torch.is_grad_enabled())
        if torch.compiler.is_compiling():
            self._traced = call
        else:
            self._seen.value = call
        return output

    def take(self) -> Call | None:
        """Return the host's last call, if it ran, and forget it."""
        seen, self._traced = self._traced, None
        if seen is None and not torch.compiler.is_compiling():
            seen, self._seen.value = self._seen.value, None
        return seen

    def __setstate__(self, state: dict[str, Any]) -> None:
        # One that an older version pickled has ``None``.
        super().__setstate__({**state, "_seen": OfThread(), "_traced": None})
