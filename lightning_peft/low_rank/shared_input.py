"""Layers that are given the same input, such as the query, key and value projections: one product with all their A."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_peft.low_rank.products import Reduce

if TYPE_CHECKING:
    from lightning_peft.low_rank.linear import LoRAAdapter

Reduced = tuple[Tensor, Tensor]
"""A xᵀ ``[r, tokens]`` and B ``[out, r]``."""


class SharedInput:
    """Adapters that are expected to be given one tensor, in the order of their calls.

    The first that gets a tensor computes the products for those behind it as well. One that is then given another
    tensor, as the key projection in cross-attention is, starts anew: an expectation that fails costs a product.
    """

    def __init__(self, *members: LoRAAdapter) -> None:
        self.members = members
        self._forget()

    def _forget(self) -> None:
        self._given: weakref.ref[Tensor] | None = None
        self._version = 0
        self._handed_on: Tensor | None = None
        self._waiting: dict[int, Reduced] = {}

    def __getstate__(self) -> dict[str, object]:
        return {"members": self.members}

    def __setstate__(self, state: dict[str, tuple[LoRAAdapter, ...]]) -> None:
        self.__init__(*state["members"])  # type: ignore[misc]

    def reduce(self, member: LoRAAdapter, x: Tensor) -> tuple[Tensor, Reduced]:
        """Return what the layer of ``member`` is to be called with instead of x, and what its low-rank term needs."""
        position = self.members.index(member)
        same = self._given is not None and self._given() is x and self._version == x._version
        if not (same and id(member) in self._waiting):
            self._compute(self.members[position:], x)
        handed_on, reduced = self._handed_on, self._waiting.pop(id(member))
        if not self._waiting:
            # Nothing of a step's graph may outlive it.
            self._forget()
        return x if handed_on is None else handed_on, reduced

    def _compute(self, members: tuple[LoRAAdapter, ...], x: Tensor) -> None:
        able = [m for m in members if m is members[0] or m.joins(members[0])]
        matrices = [m.lora_A for m in able] + [m.lora_B for m in able]
        dropout = able[0].dropout if able[0].training else 0.0
        handed_on, *results = Reduce.apply(x, dropout, *matrices)
        products, every_b = results[: len(able)], results[len(able) :]
        self._given, self._version, self._handed_on = weakref.ref(x), x._version, handed_on
        pairs = zip(able, products, every_b, strict=True)
        self._waiting = {id(m): (h, m.lora_B if b is None else b) for m, h, b in pairs}
