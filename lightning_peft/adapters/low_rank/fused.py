"""The low-rank change of parts of a layer that computes query, key and value in one.

Each part has an A of its own, as in the GPT-2 code of the LoRA paper (``MergedLinear`` of ``loralib``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_peft.adapters.low_rank.linear import LoRAAdapter
from lightning_peft.adapters.low_rank.shared_input import Member
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.calls import input_of
from lightning_peft.errors import PEFTError


class FusedLoRAAdapter(LoRAAdapter):
    """h = W0 x, and in the rows of each of P parts scale · B_p A_p x; A ``[P · r, in]``, B ``[all these rows, r]``."""

    folds_by_row = False
    axes: ClassVar[dict[str, tuple[str | None, ...]]] = {}
    before = Adapter.before

    def __init__(self, host: nn.Module, rows: Mapping[str, Tensor], r: int, *args: Any) -> None:
        super().__init__(host, r, *args)
        self._rows, self.sizes = torch.cat(list(rows.values())).tolist(), [len(of_part) for of_part in rows.values()]
        self.d_out = len(self.lora_B)
        self.lora_A = nn.Parameter(self.lora_A.new_empty(len(rows) * r, self.lora_A.shape[1]))
        self.lora_B = nn.Parameter(self.lora_B.new_empty(sum(self.sizes), r))
        index = torch.empty(sum(self.sizes), dtype=torch.long, device=self.lora_B.device)
        self.register_buffer("rows", index, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw A, set B to zero, and write down the rows."""
        super().reset_parameters()
        if "rows" in self._buffers:
            self.get_buffer("rows").copy_(torch.tensor(self._rows))

    def joins(self, other: Member) -> bool:
        """Share no product with others."""
        return False

    def _deltas(self, product: Tensor) -> Tensor:
        """Return B_p of each part times its r rows of ``product`` ``[..., P · r]``, as ``[..., rows of the parts]``."""
        r = self.lora_B.shape[1]
        halves = zip(product.split(r, dim=-1), self.lora_B.to(product.dtype).split(self.sizes), strict=True)
        return torch.cat([functional.linear(hidden, b) for hidden, b in halves], dim=-1)

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Add the low-rank terms to the rows of their parts in ``output`` ``[..., out]``."""
        x = functional.dropout(input_of(args, kwargs), self.dropout, self.training)
        # As `alpha` the scale would be a constant of a compiled program.
        delta = self._deltas(functional.linear(x, self.lora_A.to(x.dtype)) * self.scale).to(output.dtype)
        return torch.index_add(output, -1, self.get_buffer("rows"), delta)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return W0 with scale · B_p A_p added to the rows of each part."""
        product = self._deltas(self.lora_A.detach().to(weight.dtype).T).detach().T  # [rows of the parts, in]
        return torch.index_add(weight, 0, self.get_buffer("rows").to(weight.device), product, alpha=self.scale), bias

    def to_file(self, key: str, tensor: Tensor) -> Tensor:
        """Return B as that of one LoRA of rank P · r, ``[out, P · r]``, which is zero but for one block a part."""
        if key != "lora_B":
            return tensor
        whole = tensor.new_zeros(self.d_out, len(self.sizes) * tensor.shape[1])
        for rows, columns, block in self._blocks(whole, tensor):
            whole[rows, columns] = block
        return whole

    def from_file(self, key: str, tensor: Tensor) -> Tensor:
        """Undo :meth:`to_file`.

        Raises:
            PEFTError: There is something outside of the blocks.
        """
        if key != "lora_B" or tensor.shape != (self.d_out, len(self.lora_A)):
            return tensor
        compact = tensor.new_empty(self.lora_B.shape)
        for rows, columns, block in self._blocks(tensor, compact):
            block.copy_(tensor[rows, columns])
        if not torch.equal(self.to_file(key, compact), tensor):
            raise PEFTError(
                f"B of {self._name!r} changes parts of the layer that fused_parts leaves out. Load the adapter without "
                "injecting one first."
            )
        return compact

    def _blocks(self, whole: Tensor, compact: Tensor) -> list[tuple[Tensor, slice, Tensor]]:
        r = compact.shape[1]
        index = self.get_buffer("rows").to(whole.device).split(self.sizes)
        return [
            (rows, slice(part * r, (part + 1) * r), block)
            for part, (rows, block) in enumerate(zip(index, compact.split(self.sizes), strict=True))
        ]
