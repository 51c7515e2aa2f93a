"""The bottleneck f(x W_down + b_down) W_up + b_up, of which series, parallel and Compacter adapters are made."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_peft.core.adapter import Adapter
from lightning_peft.errors import PEFTError
from lightning_peft.tensors.seeding import fill

Init = Literal["truncated", "normal", "zero_up"]
INITS = ("truncated", "normal", "zero_up")

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "swish": functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": functional.leaky_relu,
    "identity": lambda x: x,
}


@dataclass(frozen=True)
class Shape:
    """Hyper-parameters of a bottleneck."""

    method: str
    """Who asks, for errors."""
    bottleneck: int
    activation: str
    bias: bool
    dropout: float
    scale: float
    init: str = "truncated"

    def __post_init__(self) -> None:
        b = self.bottleneck
        if not isinstance(b, int) or isinstance(b, bool) or b < 1:
            raise PEFTError(f"{self.method}: bottleneck={b!r} was given; it is a whole number of at least 1.")
        if self.activation not in ACTIVATIONS:
            raise PEFTError(
                f"{self.method}: activation={self.activation!r} was given; it is one of {', '.join(ACTIVATIONS)}."
            )
        if self.init not in INITS:
            raise PEFTError(f"{self.method}: init={self.init!r} was given; it is one of {', '.join(INITS)}.")
        if not 0 <= self.dropout < 1:
            raise PEFTError(f"{self.method}: dropout={self.dropout!r} was given; it is a probability in [0, 1).")
        if not (isinstance(self.scale, int | float) and math.isfinite(self.scale)):
            raise PEFTError(f"{self.method}: scale={self.scale!r} was given; it is a finite number.")
        # torch.compile makes a program for every whole number, and one for all others.
        object.__setattr__(self, "scale", float(self.scale))


class Bottleneck(Adapter):
    """s · (f(x W_down + b_down) W_up + b_up); x ``[..., in]``, down ``[b, in]``, up ``[out, b]``."""

    axes: ClassVar[dict[str, tuple[str | None, ...]]] = {
        **{"down": (None, None), "up": (None, None), "down_bias": (None,), "up_bias": (None,)}
    }

    def __init__(self, d_in: int, d_out: int, shape: Shape, options: dict[str, Any], seed: int, name: str) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(shape.bottleneck, d_in, **options))
        self.up = nn.Parameter(torch.empty(d_out, shape.bottleneck, **options))
        self.down_bias = nn.Parameter(torch.empty(shape.bottleneck, **options)) if shape.bias else None
        self.up_bias = nn.Parameter(torch.empty(d_out, **options)) if shape.bias else None
        self.shape, self._seed, self._name = shape, seed, name
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the matrices; biases are zero.

        ``truncated``: both from N(0, 0.01²) cut off at two standard deviations (Houlsby et al., 2019, section 3.6);
        ``normal``: both from N(0, 0.02²); ``zero_up``: W_down from U(-1/sqrt(in), 1/sqrt(in)), W_up zero, so that the
        adapter starts as the identity (He et al., 2022).
        """
        fill(self.down, self._seed, f"{self._name}.down", self._draw)
        if self.shape.init == "zero_up":
            nn.init.zeros_(self.up)
        else:
            fill(self.up, self._seed, f"{self._name}.up", self._draw)
        for bias in (self.down_bias, self.up_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def _draw(self, values: Tensor, generator: torch.Generator) -> None:
        if self.shape.init == "truncated":
            nn.init.trunc_normal_(values, std=0.01, a=-0.02, b=0.02, generator=generator)
        elif self.shape.init == "normal":
            nn.init.normal_(values, std=0.02, generator=generator)
        else:
            nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)

    def branch(self, x: Tensor) -> Tensor:
        """Return the bottleneck's output ``[..., out]``, scaled, for the hidden state ``x``."""
        x = functional.dropout(x, self.shape.dropout, self.training)
        hidden = ACTIVATIONS[self.shape.activation](_linear(x, self.down, self.down_bias))
        return _linear(hidden, self.up, self.up_bias) * self.shape.scale

    def extra_repr(self) -> str:
        """Show what parameters do not."""
        return f"{self.shape.activation}, scale={self.shape.scale:g}, dropout={self.shape.dropout:g}"


def _linear(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(x, matrix.to(x.dtype), None if bias is None else bias.to(x.dtype))
