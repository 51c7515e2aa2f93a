"""The low-rank changes of several adapters in one batch, without a loop over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_peft.calls import input_of
from lightning_peft.low_rank.linear import LoRAAdapter
from lightning_peft.low_rank.products import applies
from lightning_peft.rows import Rows


class LowRankRows(Rows):
    """h_i = W0 x_i + s_k B_k A_k x_i, where k is the adapter of row i; x_i ``[..., in]``.

    All A_k stand in one tensor ``[adapters, r, in]`` and all s_k B_k in another, ``[adapters, out, r]``, where r is the
    largest rank and what is missing is zero. Both are kept as long as no gradients are asked for and no value changes.
    """

    def __init__(self, name: str, adapters: Sequence[LoRAAdapter | None], rows: Tensor) -> None:
        super().__init__(name, adapters, rows)
        some = next(adapter for adapter in adapters if adapter is not None)
        self._none = some.lora_A.new_zeros(0, some.lora_A.shape[1]), some.lora_B.new_zeros(len(some.lora_B), 0)
        self._low_rank = tuple(adapters)
        scales = [0.0 if adapter is None else adapter.scale for adapter in adapters]
        wide = torch.promote_types(some.lora_B.dtype, torch.float32)
        self._scales = torch.tensor(scales, dtype=wide, device=some.lora_B.device)[:, None, None]
        self._kept: tuple[Any, tuple[Tensor, Tensor]] | None = None

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Add to each row of ``output`` ``[rows, ..., out]`` its low-rank term."""
        given = self.checked(input_of(args, kwargs))
        every_a, every_b = self._stacks(output.dtype)
        if len(self.rows) > len(self.adapters):  # else they are in the order of the rows
            every_a, every_b = every_a.index_select(0, self.rows), every_b.index_select(0, self.rows)
        x = self._dropout(given.to(output.dtype).reshape(len(given), -1, given.shape[-1]))  # [rows, tokens, in]
        hidden, y = torch.bmm(x, every_a.mT), output.reshape(len(output), -1, output.shape[-1])  # [rows, tokens, r]
        if not torch.is_grad_enabled() and output.is_contiguous() and applies(base, given, every_a, every_b):
            y.baddbmm_(hidden, every_b.mT)
            return output
        return torch.baddbmm(y, hidden, every_b.mT).to(output.dtype).view(output.shape)

    def _stacks(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._stacked(dtype)
        matrices = [m for adapter in self._low_rank if adapter is not None for m in (adapter.lora_A, adapter.lora_B)]
        state = (dtype, [(m.data_ptr(), 0 if m.is_inference() else m._version) for m in matrices])
        if self._kept is None or self._kept[0] != state:
            self._kept = (state, self._stacked(dtype))
        return self._kept[1]

    def _stacked(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        pairs = [self._none if a is None else (a.lora_A, a.lora_B) for a in self._low_rank]
        rank = max(len(a) for a, _ in pairs)
        every_a = torch.stack([a if len(a) == rank else functional.pad(a, (0, 0, 0, rank - len(a))) for a, _ in pairs])
        every_b = torch.stack(
            [b if b.shape[1] == rank else functional.pad(b, (0, rank - b.shape[1])) for _, b in pairs]
        )
        return every_a.to(dtype), (every_b * self._scales).to(dtype)

    def _dropout(self, x: Tensor) -> Tensor:
        """Return x with each row's own dropout."""
        rates = [adapter.dropout if adapter is not None and adapter.training else 0.0 for adapter in self._low_rank]
        if not any(rates):
            return x
        keep = x.new_tensor([1 - rate for rate in rates])[self.rows, None, None]
        return x * torch.bernoulli(keep.expand_as(x)) / keep
