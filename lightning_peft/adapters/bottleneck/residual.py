"""A bottleneck on the residual stream at the end of a layer, whether or not the layer normalises it there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapters.bottleneck.bottleneck import Bottleneck
from lightning_peft.adapters.bottleneck.tap import Tap
from lightning_peft.core.calls import on_hidden
from lightning_peft.errors import PEFTError


class ResidualBottleneck(Bottleneck):
    """Adds f(H W_down) W_up to the residual stream at the end of its host, a layer that returns H.

    In a layer that ends in a norm, H = N(R), it returns N(R + f(H W_down) W_up); in others H + f(H W_down) W_up. What
    a layer ends in only shows when it runs: the modules of BART's layers, which do, are those of Whisper's, which do
    not.
    """

    by_row = False

    def __init__(self, *args: Any, norms: Mapping[str, Tap]) -> None:
        super().__init__(*args)
        self._norms = list(norms)
        self.taps = nn.ModuleList(norms.values())

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Add the bottleneck's output: before the norm in which the layer ended, if it did.

        Raises:
            PEFTError: That norm ran without a graph, in reentrant activation checkpointing.
        """
        return on_hidden(output, lambda hidden: self._add(base, hidden))

    def _add(self, base: nn.Module, hidden: Tensor) -> Tensor:
        branch = self.branch(hidden)
        result = hidden + branch
        for name, tap in zip(self._norms, self.taps, strict=True):
            assert isinstance(tap, Tap)
            seen = tap.take()
            if seen is not None and _is_same(seen.output, hidden):
                if torch.is_grad_enabled() and not seen.with_graph:
                    raise PEFTError(
                        f"SeriesAdapter: placement='residual' (preset='pfeiffer') adds to what the norm {name!r} gets, "
                        "which reentrant activation checkpointing computes without a graph: gradients would be lost. "
                        "Give gradient_checkpointing_kwargs={'use_reentrant': False}."
                    )
                result = base.get_submodule(name)(seen.input + branch)
                tap.take()
        return result


def _is_same(tensor: Any, other: Tensor) -> bool:
    if tensor is other or torch.compiler.is_compiling():
        return tensor is other
    # DeepSpeed hands on another tensor of the same memory.
    plain = type(tensor) is type(other) is Tensor and tensor.dtype == other.dtype
    return plain and other.is_set_to(tensor)
