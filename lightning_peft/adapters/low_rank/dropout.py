"""Which elements dropout leaves, as one byte for each."""

from __future__ import annotations

import torch
from torch import Tensor

_LEVELS = 2**16


def kept_fraction(dropout: float, device: torch.device) -> float:
    """Return the probability with which an element is left: on CPUs 1 - ``dropout`` to 16 bits."""
    return 1 - (round(dropout * _LEVELS) / _LEVELS if device.type == "cpu" else dropout)


def drop(x: Tensor, dropout: float) -> tuple[Tensor, Tensor, float]:
    """Set elements of ``x`` to zero.

    Returns:
        The values; whether an element was left, bool; what the values have still to be multiplied by.
    """
    if x.device.type != "cpu":
        return *torch.native_dropout(x, dropout, True), 1.0
    # A generator on a CPU is slow: it is asked for 64 bits at a time, which serve four elements.
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    mask = draws.view(torch.int16)[: x.numel()].view(x.shape) >= round(dropout * _LEVELS) - _LEVELS // 2
    return x * mask, mask, 1 / kept_fraction(dropout, x.device)


def drop_again(x: Tensor, mask: Tensor, kept: float) -> tuple[Tensor, float]:
    """Set the elements of ``x`` to zero that ``mask`` did not leave; ``kept`` is the fraction that is left.

    Returns:
        The values, and what they have still to be multiplied by.
    """
    if x.device.type != "cpu":
        # One kernel over 16-bit numbers and bytes; their product is one that converts them, three times as slow.
        return torch.ops.aten.native_dropout_backward(x, mask, 1 / kept), 1.0
    return x * mask, 1 / kept
