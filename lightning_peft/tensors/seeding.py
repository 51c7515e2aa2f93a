"""Initial values that depend on (seed, name) alone: the same on every rank, the global random stream untouched."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from lightning_peft.tensors.sharding import write

_left_empty = ContextVar("_left_empty", default=False)


@contextmanager
def parameters_left_empty() -> Iterator[None]:
    """Within it :func:`fill` leaves parameters alone: all of them are about to get values from a file."""
    token = _left_empty.set(True)
    try:
        yield
    finally:
        _left_empty.reset(token)


def fill(parameter: Tensor, seed: int, name: str, init: Callable[[Tensor, torch.Generator], object]) -> None:
    """Set ``parameter`` to what ``init`` draws from a private generator seeded by ``(seed, name)``.

    Values are drawn on the CPU in float32 and then copied, so that they do not depend on device or dtype. A meta
    tensor is left alone: it is filled by ``reset_parameters`` once it is materialised.
    """
    if parameter.is_meta or (_left_empty.get() and isinstance(parameter, nn.Parameter)):
        return
    generator = generator_of(seed, name)
    values = torch.empty(parameter.shape, dtype=torch.float32)
    with torch.no_grad():
        init(values, generator)
    write(parameter, values)


def generator_of(seed: int, name: str) -> torch.Generator:
    """Return a private generator, on the CPU, seeded by ``(seed, name)``."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
