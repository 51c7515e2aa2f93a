"""The low-rank changes of several adapters in one batch, without a loop over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_peft.calls import input_of
from lightning_peft.low_rank.linear import LoRAAdapter
from lightning_peft.rows import Rows


class LowRankRows(Rows):
    """h_i = W0 x_i + s_k B_k A_k x_i, where k is the adapter of row i; x_i ``[..., in]``.

    All A_k stand in one tensor ``[adapters, r, in]`` and all s_k B_k in another, ``[adapters, out, r]``, where r is the
    largest rank and what is missing is zero. Both are kept as long as no gradients are asked for and no value changes.
    """

    adapters: tuple[LoRAAdapter | None, ...]

    def __init__(self, name: str, adapters: Sequence[LoRAAdapter | None], rows: Tensor) -> None:
        super().__init__(name, adapters, rows)
        self._kept: tuple[Any, tuple[Tensor, Tensor]] | None = None

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Add to each row of ``output`` ``[rows, ..., out]`` its low-rank term."""
        x = self.checked(input_of(args, kwargs))
        every_a, every_b = self._stacks(x.dtype)
        x = self._dropout(x.reshape(len(x), -1, x.shape[-1]))  # [rows, tokens, in]
        hidden = torch.bmm(x, every_a.index_select(0, self.rows).mT)  # [rows, tokens, r]
        delta = torch.bmm(hidden, every_b.index_select(0, self.rows).mT)  # [rows, tokens, out]
        return (output + delta.view(output.shape)).to(output.dtype)

    def _stacks(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._stacked(dtype)
        matrices = [m for a in self.adapters if a is not None for m in (a.lora_A, a.lora_B)]
        state = (dtype, [(m.data_ptr(), 0 if m.is_inference() else m._version) for m in matrices])
        if self._kept is None or self._kept[0] != state:
            self._kept = (state, self._stacked(dtype))
        return self._kept[1]

    def _stacked(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        rank = max(len(a.lora_A) for a in self.adapters if a is not None)
        some = next(a for a in self.adapters if a is not None)
        none = some.lora_A.new_zeros(0, some.lora_A.shape[1]), some.lora_B.new_zeros(some.lora_B.shape[0], 0)
        pairs = [none if a is None else (a.lora_A, a.lora_B * a.scale) for a in self.adapters]
        every_a = [functional.pad(a.to(dtype), (0, 0, 0, rank - len(a))) for a, _ in pairs]
        every_b = [functional.pad(b.to(dtype), (0, rank - b.shape[1])) for _, b in pairs]
        return torch.stack(every_a), torch.stack(every_b)

    def _dropout(self, x: Tensor) -> Tensor:
        """Return x with each row's own dropout."""
        rates = [a.dropout if a is not None and a.training else 0.0 for a in self.adapters]
        if not any(rates):
            return x
        keep = x.new_tensor([1 - rate for rate in rates])[self.rows, None, None]
        return x * torch.bernoulli(keep.expand_as(x)) / keep
