"""The low-rank changes of several adapters in one batch, without a loop over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.calls import input_of
from lightning_peft.low_rank.linear import LoRAAdapter
from lightning_peft.low_rank.products import applies
from lightning_peft.rows import Rows, padded


class LowRankRows(Rows):
    """h_i = W0 x_i + s_k B_k A_k x_i, where k is the adapter of row i; x_i ``[..., in]``.

    All A_k stand in one tensor ``[adapters, r, in]`` and all s_k B_k in another, ``[adapters, out, r]``, where r is the
    largest rank and what is missing is zero.
    """

    def __init__(self, name: str, adapters: Sequence[LoRAAdapter | None], rows: Tensor) -> None:
        super().__init__(name, adapters, rows)
        some = next(adapter for adapter in adapters if adapter is not None)
        a, b = some.lora_A.detach(), some.lora_B.detach()
        self._none, self._low_rank = (a[:0], b[:, :0]), tuple(adapters)
        scales = [0.0 if adapter is None else adapter.scale for adapter in adapters]
        wide = torch.promote_types(b.dtype, torch.float32)
        self._scales = torch.tensor(scales, dtype=wide, device=b.device)[:, None, None]

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Add to each row of ``output`` ``[rows, ..., out]`` its low-rank term."""
        given = self.checked(input_of(args, kwargs))
        pairs = [self._none if a is None else (a.lora_A, a.lora_B) for a in self._low_rank]
        stacks = self.kept(output.dtype, [m for pair in pairs for m in pair], lambda: self._stacked(pairs))
        every_a, every_b = self.of_rows(stacks)
        rates = [adapter.dropout if adapter is not None and adapter.training else 0.0 for adapter in self._low_rank]
        x = self.dropped(given.to(output.dtype).reshape(len(given), -1, given.shape[-1]), rates)  # [rows, tokens, in]
        hidden, y = torch.bmm(x, every_a.mT), output.reshape(len(output), -1, output.shape[-1])  # [rows, tokens, r]
        if not torch.is_grad_enabled() and output.is_contiguous() and applies(base, given, every_a, every_b):
            y.baddbmm_(hidden, every_b.mT)
            return output
        return torch.baddbmm(y, hidden, every_b.mT).to(output.dtype).view(output.shape)

    def _stacked(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        return [padded([a for a, _ in pairs]), padded([b for _, b in pairs]) * self._scales]
