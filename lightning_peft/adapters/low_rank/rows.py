"""The low-rank changes of several adapters in one batch, without a loop over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapters.low_rank.linear import LoRAAdapter
from lightning_peft.adapters.low_rank.products import product_dtype
from lightning_peft.adapters.rows import Rows, padded
from lightning_peft.core.calls import input_of


class LowRankRows(Rows):
    """h_i = W0 x_i + s_k B_k A_k x_i, where k is the adapter of row i; x_i ``[..., in]``.

    All A_k stand in one tensor ``[adapters, r, in]`` and all s_k B_k in another, ``[adapters, out, r]``, where r is the
    largest rank and what is missing is zero.
    """

    def __init__(self, name: str, adapters: Sequence[LoRAAdapter | None], rows: Tensor) -> None:
        super().__init__(name, adapters, rows)
        some = next(adapter for adapter in adapters if adapter is not None)
        a, b = some.lora_A.detach(), some.lora_B.detach()
        none, self._low_rank = {"lora_A": a[:0], "lora_B": b[:, :0]}, tuple(adapters)
        # Looking eight adapters' matrices up as attributes takes longer than multiplying by them.
        self._every_a = [none if adapter is None else _dict_with(adapter, "lora_A") for adapter in adapters]
        self._every_b = [none if adapter is None else _dict_with(adapter, "lora_B") for adapter in adapters]
        scales = [0.0 if adapter is None else adapter.scale for adapter in adapters]
        wide = torch.promote_types(b.dtype, torch.float32)
        self._scales = torch.tensor(scales, dtype=wide, device=b.device)[:, None, None]

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Add to each row of ``output`` ``[rows, ..., out]`` its low-rank term."""
        given = self.checked(input_of(args, kwargs))
        matrices = [found["lora_A"] for found in self._every_a], [found["lora_B"] for found in self._every_b]
        stacks = self.kept(output.dtype, matrices[0] + matrices[1], lambda: self._stacked(*matrices))
        every_a, every_b = self.of_rows(stacks)
        rates = [a.dropout if a is not None and a.training else 0.0 for a in self._low_rank]
        x = self.dropped(given.to(output.dtype).reshape(len(given), -1, given.shape[-1]), rates)  # [rows, tokens, in]
        hidden, y = torch.bmm(x, every_a.mT), output.reshape(len(output), -1, output.shape[-1])  # [rows, tokens, r]
        plain = torch.is_grad_enabled() or product_dtype(base, given, every_a, every_b) is None
        if not plain and output.is_contiguous():
            y.baddbmm_(hidden, every_b.mT)
            return output
        return torch.baddbmm(y, hidden, every_b.mT).to(output.dtype).view(output.shape)

    def _stacked(self, every_a: Sequence[Tensor], every_b: Sequence[Tensor]) -> list[Tensor]:
        return [padded(every_a), padded(every_b) * self._scales]


def _dict_with(adapter: LoRAAdapter, name: str) -> Any:
    return adapter._parameters if name in adapter._parameters else adapter._buffers
