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
