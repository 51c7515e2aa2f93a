"""DoRA: Weight-Decomposed Low-Rank Adaptation (Liu et al., 2024), arXiv:2402.09353, sections 4.1 and 4.3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.adapters.low_rank.embedding import EmbeddingLoRAAdapter
from lightning_peft.adapters.low_rank.linear import LoRAAdapter
from lightning_peft.errors import PEFTError
from lightning_peft.methods.lora import LoRA
from lightning_peft.structure.plain import nature
from lightning_peft.tensors.packed import is_packed
from lightning_peft.tensors.sharding import whole
from lightning_peft.tensors.weights import as_matrix, is_transposed, read_matrix, weight_of, widened

_ELEMENTS = 2**16
"""Of a weight whose norms are taken so many are widened at once.

Each part is freed before what stays is allocated, which then lies in the hole: large ones would add up to the weights.
"""


class DoRAAdapter(LoRAAdapter):
    """W' = m ⊙ (W0 + scale · B A) / ‖W0 + scale · B A‖ (equation 5); m ``[out]``, norms over the input dimension."""

    axes: ClassVar[dict[str, tuple[str | None, ...]]] = {**LoRAAdapter.axes, "lora_magnitude_vector": ("out",)}
    _start: Tensor | None = None

    def __init__(self, host: nn.Module, *args: Any) -> None:
        super().__init__(host, *args)
        self._start = _start_norms(host)
        self.lora_magnitude_vector = nn.Parameter(self._start.to(self.lora_B).clone())

    @staticmethod
    def shapes(host: nn.Module, r: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of A, B and the magnitudes."""
        shapes = LoRAAdapter.shapes(host, r)
        return {**shapes, "lora_magnitude_vector": shapes["lora_B"][:1]}

    @staticmethod
    def refusal(host: nn.Module, r: int, dropout: float, freeze_A: bool) -> str | None:
        """Refuse a weight whose norms are not at hand, or say nothing."""
        if is_packed(host):
            return "its weight is quantised, so that the norms of its rows, which DoRA needs, are not at hand"
        if nature(host) == "beside":
            return f"what a {type(host).__name__} computes is no function of the norms of its weight's rows"
        return None

    def reset_parameters(self) -> None:
        """Set B A to zero and the magnitudes to the norms of the weight, which then is unchanged."""
        super().reset_parameters()
        if self._start is None:
            return
        if self._start.is_meta:
            raise PEFTError(
                f"DoRA: the magnitudes of {self._name!r} start as the norms of its weight, which had no values yet "
                "(device meta) when the adapter was made. Load the model's weights before injecting."
            )
        with torch.no_grad():
            self.lora_magnitude_vector.copy_(self._start)

    @torch.no_grad()
    def _norms(self, matrix: Tensor) -> Tensor:
        """Return ‖W0 + scale · B A‖ ``[out]`` for W0: a constant to the gradient (section 4.3)."""
        return _row_norms(super().fold(matrix, None)[0])

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Rescale what LoRA makes of ``output`` ``[..., out]``, but for the bias.

        Dropout concerns the low-rank term alone.
        """
        updated = super().forward(base, args, kwargs, output)
        bias = base._parameters.get("bias")
        # While the layer runs, its weight is as it is read: whole, or split as the adapter is.
        norms = self._norms(as_matrix(base, weight_of(base)))
        change = self.lora_magnitude_vector / norms - 1
        return (updated + change * (updated if bias is None else updated - bias)).to(output.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return m ⊙ V / ‖V‖ with V = W0 + scale · B A."""
        direction = super().fold(weight, bias)[0]
        norms = _row_norms(direction)
        return direction * (self.lora_magnitude_vector.detach().to(norms) / norms)[:, None], bias


class EmbeddingDoRAAdapter(DoRAAdapter, EmbeddingLoRAAdapter):
    """The same for an embedding: one magnitude for each of its dimensions."""

    axes: ClassVar[dict[str, tuple[str | None, ...]]] = {**DoRAAdapter.axes, **EmbeddingLoRAAdapter.axes}
    refusal = staticmethod(EmbeddingLoRAAdapter.refusal)


@torch.no_grad()
def _start_norms(host: nn.Module) -> Tensor:
    """Return the norms of the weight, ``[out]``: of its rows some after others, since they may lie in a file."""
    if is_transposed(host):
        # In the layout of what a step takes norms of: other orders of a sum round otherwise.
        return _row_norms(read_matrix(host).contiguous())
    weight = whole(weight_of(host))
    if weight.is_meta:  # Nothing is read, and each part would cost time all the same.
        return _row_norms(widened(weight).flatten(1))
    rows = max(1, _ELEMENTS // max(1, weight[:1].numel()))
    return torch.cat([_row_norms(widened(some).flatten(1)) for some in weight.split(rows)])


def _row_norms(matrix: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=1)
    # A row of zeros has the magnitude zero, and stays one.
    return norms.clamp(min=torch.finfo(norms.dtype).tiny)


@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """LoRA for the direction of each row of a weight, and a learned length for it.

    Args:
        r: Rank of the update of the directions.
        alpha: That update is multiplied by ``alpha / r``.
        dropout: Probability with which an element of the low-rank term's input is zeroed during training.
        target_modules: What to adapt, as for :class:`LoRA`.
        exclude_modules: Patterns of modules to leave out, with what is in them.
        layers: Blocks to adapt: indices, or a slice such as ``"8:16"`` or ``"-4:"``.
        rank_pattern: Other ranks for some modules, by pattern.
        alpha_pattern: Other alphas for some modules, by pattern.
        use_rslora: Multiply by ``alpha / sqrt(r)`` instead.
        loraplus_lr_ratio: The learning rate of B is multiplied by this (LoRA+).
        freeze_A: Train B and the magnitudes alone (LoRA-FA).
        init: How A is drawn, as for :class:`LoRA`. B is zero.
        lora_bias: Only :class:`LoRA` has one.
        fused_parts: Only :class:`LoRA` adapts parts of a layer.
        alora_invocation_tokens: Only :class:`LoRA` is activated by tokens.
    """

    name: ClassVar[str] = "dora"
    hosts: ClassVar[str] = "linear layers, Conv1D, embeddings"
    count: ClassVar[str] = "Σ r (in + out) + out"
    kinds: ClassVar[tuple[type[LoRAAdapter], ...]] = (DoRAAdapter, EmbeddingDoRAAdapter)
    changes_weights: ClassVar[bool] = False
    adapts_parts: ClassVar[bool] = False

    @property
    def reads_weights(self) -> bool:
        """Whether adapters start from the weight: the magnitudes are its norms."""
        return True
