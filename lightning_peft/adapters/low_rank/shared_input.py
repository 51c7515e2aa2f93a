"""Layers that are given the same input, such as the query, key and value projections: one product with all their A."""

from __future__ import annotations

import threading
import weakref
from typing import Protocol

import torch
from torch import Tensor

from lightning_peft.adapters.low_rank.products import First, Following


class Member(Protocol):
    """An adapter as it is seen from here: s · B A x, with dropout of x while it is in training."""

    @property
    def lora_A(self) -> Tensor:
        """A, ``[r, in]``."""

    @property
    def lora_B(self) -> Tensor:
        """B, ``[out, r]``."""

    scale: float
    dropout: float
    training: bool

    def joins(self, other: Member) -> bool:
        """Whether one product with the A of both can serve both, if they are given the same input."""


class _Call(threading.local):
    """What a thread has for the layers that it calls next."""

    def __init__(self) -> None:
        self.present: tuple[Tensor, Tensor, Tensor | None] | None = None
        """While a layer is called: what it was to be called with, the same without its graph, and the frozen weight."""
        self.forget()

    def forget(self) -> None:
        self.given: weakref.ref[Tensor] | None = None
        self.version = 0
        self.read: Tensor | None = None
        self.waiting: dict[int, tuple[Tensor, Tensor]] = {}

    def knows(self, x: Tensor) -> bool:
        return self.given is not None and self.given() is x and self.version == x._version


class SharedInput:
    """Adapters that are expected to be given one tensor, in the order of their calls.

    The first that gets a tensor computes the products for those behind it as well. One that is then given another
    tensor, as the key projection in cross-attention is, starts anew: an expectation that fails costs a product. Threads
    that call one model know nothing of one another's tensors.
    """

    def __init__(self, *members: Member) -> None:
        self.members = members
        self._call = _Call()

    def __getstate__(self) -> dict[str, object]:
        return {"members": self.members}

    def __setstate__(self, state: dict[str, tuple[Member, ...]]) -> None:
        self.__init__(*state["members"])  # type: ignore[misc]

    def begin(self) -> None:
        """Forget a call that failed half-way."""
        self._call.present = None

    def has_read(self) -> bool:
        """Whether :meth:`read` was called for the layer that is called now."""
        return self._call.present is not None

    def read(self, x: Tensor, dtype: torch.dtype, weight: Tensor | None) -> Tensor:
        """Return x without its graph in ``dtype``: what a layer whose ``weight`` is frozen is to be called with."""
        call = self._call
        read = call.read
        if read is None or read.dtype != dtype or not call.knows(x):
            call.forget()
            read = x.detach() if x.requires_grad else x
            read = read if read.dtype == dtype else read.to(dtype)
        call.present = x, read, weight
        return read

    def add(self, member: Member, output: Tensor) -> Tensor:
        """Return ``output`` of the layer of ``member``, for which :meth:`read` was called, with the term added."""
        call = self._call
        assert call.present is not None
        (x, read, weight), call.present = call.present, None
        if (found := call.waiting.pop(id(member), None)) is None:
            return self._first(member, x, read, weight, output)
        if not call.waiting:
            # Nothing of a step's graph may outlive it.
            call.forget()
        added: Tensor = Following.apply(output, x, weight, *found, member.scale)
        return added

    def _first(self, member: Member, x: Tensor, read: Tensor, weight: Tensor | None, output: Tensor) -> Tensor:
        behind: list[Member] = []
        if member is not self.members[-1]:
            behind = [m for m in self.members[self.members.index(member) + 1 :] if m.joins(member)]
        every_a, every_b = [member.lora_A], [member.lora_B]
        for other in behind:
            every_a.append(other.lora_A)
            every_b.append(other.lora_B)
        count, cast = len(every_a), every_b[0].dtype != read.dtype
        dropout = member.dropout if member.training else 0.0
        fixed = (read, weight, member.scale, dropout, count)
        added, *results = First.apply(output, x, fixed, *every_a, *(every_b if cast else every_b[:1]))
        if behind:
            call = self._call
            call.given, call.version, call.read = weakref.ref(x), x._version, read
            others = results[count:] if cast else every_b[1:]
            pairs = zip(results[1:count], others, strict=False)
            call.waiting = {id(m): pair for m, pair in zip(behind, pairs, strict=True)}
        return added  # type: ignore[no-any-return]
