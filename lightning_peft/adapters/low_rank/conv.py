"""The low-rank change of a convolution, as HF PEFT defines it: A is a convolution of its own to r channels."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_peft.adapters.low_rank.linear import LoRAAdapter
from lightning_peft.core.calls import add_scaled, input_of
from lightning_peft.tensors.weights import is_conv

_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
_CONVOLUTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)


class ConvLoRAAdapter(LoRAAdapter):
    """h = W0 * x + scale · B (A * x); x ``[batch, in, ...]``, A ``[r, in, *kernel]``, B ``[out, r / groups, 1, ...]``.

    A has the host's stride, padding and dilation, and sees the channels of all groups; B mixes the r channels at each
    place, in the host's groups. So with several groups the change is no change of the host's weight: it cannot be
    merged. HF PEFT leaves out dilation and padding modes, and fails or deviates there.
    """

    folds_by_row = False
    axes: ClassVar[dict[str, tuple[str | None, ...]]] = {}

    def __init__(self, host: nn.Module, *args: Any) -> None:
        super().__init__(host, *args)
        assert isinstance(host, _Conv)
        self.mergeable = host.groups == 1

    @staticmethod
    def serves(module: nn.Module) -> bool:
        """Whether ``module`` is a convolution."""
        return is_conv(module)

    @staticmethod
    def shapes(host: nn.Module, r: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of A and B."""
        assert isinstance(host, _Conv)
        ones = (1,) * len(host.kernel_size)
        return {
            "lora_A": (r, host.in_channels, *host.kernel_size),
            "lora_B": (host.out_channels, r // host.groups, *ones),
        }

    @staticmethod
    def refusal(host: nn.Module, r: int, dropout: float, freeze_A: bool) -> str | None:
        """Refuse a rank that the host's groups cannot share evenly."""
        assert isinstance(host, _Conv)
        if r % host.groups:
            return f"its {host.groups} groups cannot share the rank {r} evenly (rank_pattern gives it another)"
        return None

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Add the low-rank term to ``output`` ``[batch, out, ...]``."""
        assert isinstance(base, _Conv)
        convolve: Any = _CONVOLUTIONS[len(base.kernel_size) - 1]
        x = functional.dropout(input_of(args, kwargs), self.dropout, self.training)
        x, padding = _padded(base, x)
        hidden = convolve(x, self.lora_A.to(x.dtype), None, base.stride, padding, base.dilation)  # [batch, r, ...]
        delta = convolve(hidden, self.lora_B.to(hidden.dtype), groups=base.groups)
        return add_scaled(output, delta, self.scale).to(output.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return W0 + scale · B A for a weight ``[out, in · kernel]``."""
        product = self.lora_B.detach().flatten(1).to(weight.dtype) @ self.lora_A.detach().flatten(1).to(weight.dtype)
        return torch.add(weight, product, alpha=self.scale), bias


def kernel_of(module: nn.Module) -> tuple[int, int] | None:
    """Return the sides of a kernel that may be factored apart from the channels, the second 1 in one dimension.

    There is none, ``None``, beside other modules than convolutions in one or two dimensions, and in a single place.
    """
    if not isinstance(module, nn.Conv1d | nn.Conv2d) or math.prod(module.kernel_size) == 1:
        return None
    height, width = (*module.kernel_size, 1)[:2]
    return height, width


def with_core(core: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return ``[out, in · kernel]`` of a core ``[r, r, height, width]``, ``[r, out]`` and ``[r, in]``."""
    return torch.einsum("ijkl,io,jn->onkl", core, left, right).flatten(1)


def convolved(base: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """Return what the convolution ``base`` would make of ``x`` with ``weight``, of its own one's shape, and no bias."""
    assert isinstance(base, _Conv)
    x, padding = _padded(base, x)
    convolve: Any = _CONVOLUTIONS[len(base.kernel_size) - 1]
    made: Tensor = convolve(x, weight, None, base.stride, padding, base.dilation, base.groups)
    return made


def _padded(base: _Conv, x: Tensor) -> tuple[Tensor, Any]:
    """Return ``x`` padded as ``base`` pads it, and the padding that is left to the convolution."""
    if base.padding_mode == "zeros":
        return x, base.padding
    ends: list[int] = []  # for functional.pad: before and after, from the last dimension on
    for dim in reversed(range(len(base.kernel_size))):
        if base.padding == "same":
            total = base.dilation[dim] * (base.kernel_size[dim] - 1)
            ends += [total // 2, total - total // 2]
        else:
            ends += [0, 0] if base.padding == "valid" else [int(base.padding[dim])] * 2
    return functional.pad(x, ends, mode=base.padding_mode), 0
