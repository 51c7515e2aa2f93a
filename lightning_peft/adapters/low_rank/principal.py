"""Low-rank changes that start from a part of the weight instead of zero.

PiSSA (Meng et al., 2024), arXiv:2404.02948, section 3, and OLoRA (Büyükakyüz, 2024), arXiv:2406.01775, section 3. Both
take the part scale · B0 A0 out of the weight and train it. Here the weight stays as it is: the change is measured from
its start, scale · (B A - B0 A0), which has the same outputs and gradients.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_peft.adapters.low_rank.linear import LoRAAdapter
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.calls import add_scaled, input_of
from lightning_peft.errors import PEFTError
from lightning_peft.tensors.packed import is_packed
from lightning_peft.tensors.seeding import fill
from lightning_peft.tensors.sharding import write
from lightning_peft.tensors.weights import read_matrix

_INIT = re.compile(r"olora|pissa(?:_niter_(\d+))?")


def is_principal(init: str) -> bool:
    """Whether ``init`` is one of those of this file: ``pissa``, ``pissa_niter_16``, ``olora``."""
    return _INIT.fullmatch(init) is not None


class PrincipalAdapter(LoRAAdapter):
    """h = W0 x + scale · (B A - B0 A0) x; A, A0 ``[r, in]``, B, B0 ``[out, r]``, of which A0 and -B0 are buffers.

    Computed as scale · [B - B0, B0] [A; A - A0] x: in half precision a difference of two large products would be
    nothing but rounding while the change is small. So it is zero exactly at the start, and dropout concerns the change.
    """

    axes: ClassVar[dict[str, tuple[str | None, ...]]] = {
        **LoRAAdapter.axes,
        **{"start_A": LoRAAdapter.axes["lora_A"], "minus_start_B": LoRAAdapter.axes["lora_B"]},
    }
    before = Adapter.before
    start_A: Tensor
    minus_start_B: Tensor
    _decomposed: bool | None = None

    def __init__(self, host: nn.Module, *args: Any) -> None:
        super().__init__(host, *args)
        self.register_buffer("start_A", torch.empty_like(self.lora_A, requires_grad=False))
        self.register_buffer("minus_start_B", torch.empty_like(self.lora_B, requires_grad=False))
        self._decomposed = not (matrix := read_matrix(host)).is_meta
        if self._decomposed:
            a, b = self._start(matrix.detach())
            self.start_A.copy_(a)
            self.minus_start_B.copy_(-b)
        self.reset_parameters()

    @staticmethod
    def refusal(host: nn.Module, r: int, dropout: float, freeze_A: bool) -> str | None:
        """Refuse a weight whose values are not at hand."""
        return "A and B start in its weight, which is quantised" if is_packed(host) else None

    def reset_parameters(self) -> None:
        """Set A and B to where they start."""
        if self._decomposed is None or self.start_A.is_meta:
            return
        if not self._decomposed:
            raise PEFTError(
                f"LoRA: with init={self._init!r} the adapter of {self._name!r} starts from its weight, which had no "
                "values yet (device meta) when the adapter was made. Load the model's weights before injecting."
            )
        write(self.lora_A, self.start_A)
        write(self.lora_B, -self.minus_start_B)

    def _start(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Return A0 and B0 for the weight ``[out, in]``."""
        r = len(self.lora_A)
        if self._init == "olora":
            q, upper = torch.linalg.qr(matrix)
            return upper[:r], q[:, :r]
        found = _INIT.fullmatch(self._init)
        u, s, vh = self._svd(matrix, r, None if found is None or found[1] is None else int(found[1]))
        root = (s[:r] / self.scale).sqrt()
        return root[:, None] * vh[:r], u[:, :r] * root

    def _svd(self, matrix: Tensor, r: int, iterations: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Decompose ``matrix``; with ``iterations`` only its range of dimension r, as Halko et al., arXiv:0909.4061."""
        if iterations is None:
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
            return u, s, vh
        sample = torch.empty(matrix.shape[1], r, dtype=matrix.dtype, device=matrix.device)
        fill(sample, self._seed, self._name, lambda values, g: nn.init.normal_(values, generator=g))
        q = torch.linalg.qr(matrix @ sample).Q
        for _ in range(iterations):
            q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ q).Q).Q
        u, s, vh = torch.linalg.svd(q.T @ matrix, full_matrices=False)
        return q @ u, s, vh

    def _factors(self) -> tuple[Tensor, Tensor]:
        down = torch.cat([self.lora_A, self.lora_A - self.start_A])  # [2r, in]
        return down, torch.cat([self.lora_B + self.minus_start_B, -self.minus_start_B], dim=1)  # [out, 2r]

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Add the change since the start to ``output`` ``[..., out]``."""
        x = functional.dropout(input_of(args, kwargs), self.dropout, self.training)
        down, up = self._factors()
        hidden = functional.linear(x, down.to(x.dtype))  # [..., 2r]
        delta = functional.linear(hidden, up.to(hidden.dtype))
        return add_scaled(output, delta, self.scale).to(output.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return W0 + scale · (B A - B0 A0)."""
        down, up = (factor.detach().to(weight.dtype) for factor in self._factors())
        return torch.add(weight, up @ down, alpha=self.scale), bias
