"""A bias beside a linear layer, that starts at zero."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.core.adapter import Adapter
from lightning_peft.tensors.weights import features, tensor_options


class AddedBias(Adapter):
    """h = W0 x + b0 + b; b ``[out]``. The layer need have no bias b0 of its own."""

    mergeable = True
    adds_bias = True
    axes: ClassVar[dict[str, tuple[str | None, ...]]] = {"bias": ("out",)}
    key: ClassVar[str] = "bias"
    """What the parameter is called."""
    rows: ClassVar[tuple[int, ...]] = ()
    """Dimensions before the only one."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        zeros = torch.zeros(*self.rows, features(host)[1], **tensor_options(host))
        self.register_parameter(self.key, nn.Parameter(zeros))

    def reset_parameters(self) -> None:
        """Set the bias to zero."""
        nn.init.zeros_(self.get_parameter(self.key))

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Add the bias to ``output`` ``[..., out]``."""
        return output + self.get_parameter(self.key).flatten().to(output.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the layer's bias with this one in it, or this one as its own."""
        own = self.get_parameter(self.key).detach().flatten().to(weight.dtype)
        return weight, own if bias is None else bias + own
