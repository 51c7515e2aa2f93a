"""The bottlenecks of several adapters in one batch, without a loop over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapters.bottleneck.bottleneck import ACTIVATIONS, Bottleneck
from lightning_peft.adapters.bottleneck.tap import Call
from lightning_peft.adapters.rows import GroupedRows, padded


class BottleneckRows(GroupedRows):
    """Bottlenecks of one class and one activation, each on its own rows.

    It calls the hooks of that class with itself, and so provides what they use: :meth:`branch` and :attr:`tap`.
    """

    def __init__(self, name: str, adapters: Sequence[Bottleneck | None], rows: Tensor) -> None:
        super().__init__(name, adapters, rows)
        self._bottlenecks = tuple(adapters)
        self._some: Any = next(adapter for adapter in adapters if adapter is not None)

    @staticmethod
    def serves(adapters: Sequence[Bottleneck | None]) -> bool:
        """Whether ``adapters`` are of one class and one activation."""
        kinds = {(type(adapter), adapter.shape.activation) for adapter in adapters if adapter is not None}
        return len(kinds) == 1 and all(kind.branch is Bottleneck.branch for kind, _ in kinds)

    def before(
        self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Do what the adapters' class does."""
        changed: tuple[tuple[Any, ...], dict[str, Any]] = type(self._some).before(self, base, args, kwargs)
        return changed

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Do what the adapters' class does."""
        return type(self._some).forward(self, base, args, kwargs, output)

    @property
    def tap(self) -> BottleneckRows | None:
        """What has the input of a parallel adapter, if that is another module's."""
        return None if getattr(self._some, "tap", None) is None else self

    def take(self) -> Call | None:
        """Return what the taps of all adapters were called with, if they ran: each has seen its own rows."""
        adapters: Sequence[Any] = self.adapters
        seen: list[Call | None] = [None if adapter is None else adapter.tap.take() for adapter in adapters]
        some = next((call.input for call in seen if call is not None), None)
        if some is None:
            return None
        sizes = [len(group) for group in self.groups]
        none = [some.new_zeros(size, *some.shape[1:]) for size in sizes]
        parts = [n if call is None else call.input for call, n in zip(seen, none, strict=True)]
        return Call(self.joined(parts), None, torch.is_grad_enabled())

    def branch(self, x: Tensor) -> Tensor:
        """Return what each bottleneck makes of its rows of x ``[rows, ..., in]``; zero for rows without one."""
        rates = [0.0 if b is None or not b.training else b.shape.dropout for b in self._bottlenecks]
        rows = self.dropped(self.checked(x).reshape(len(x), -1, x.shape[-1]), rates)  # [rows, tokens, in]
        parameters = [p for b in self._bottlenecks if b is not None for p in b.parameters()]
        down, up, down_bias, up_bias = self.of_rows(self.kept(x.dtype, parameters, self._stacked))
        hidden = ACTIVATIONS[self._some.shape.activation](torch.baddbmm(down_bias, rows, down.mT))
        return torch.baddbmm(up_bias, hidden, up.mT).view(*x.shape[:-1], up.shape[1])

    def _stacked(self) -> list[Tensor]:
        """Return all W_down ``[adapters, b, in]``, W_up and biases ``[adapters, 1, b]``; the scale is in the latter."""
        some = self._some
        none = some.down.new_zeros(0, some.down.shape[1]), some.up.new_zeros(len(some.up), 0)
        parts: list[list[Tensor]] = [[], [], [], []]
        for b in self._bottlenecks:
            down, up = none if b is None else (b.down, b.up)
            biases = (None, None) if b is None else (b.down_bias, b.up_bias)
            scale = 1.0 if b is None else b.shape.scale
            bias_down, bias_up = (
                matrix.new_zeros(len(matrix)) if bias is None else bias
                for matrix, bias in zip((down, up), biases, strict=True)
            )
            for part, tensor in zip(parts, (down, up * scale, bias_down[None], bias_up[None] * scale), strict=True):
                part.append(tensor)
        return [padded(part) for part in parts]
