"""The low-rank change of an embedding, as in the code of the LoRA paper (arXiv:2106.09685)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_peft.adapters.low_rank.linear import LoRAAdapter
from lightning_peft.core.calls import input_of
from lightning_peft.tensors.seeding import fill


class EmbeddingLoRAAdapter(LoRAAdapter):
    """e = E[i] + scale · B A[:, i]; i ``[...]``, A ``[r, tokens]``, B ``[dim, r]``. There is no dropout."""

    folds_by_row = False
    # Split by its tokens, A would be looked up with a mask of its own, of which torch 2.13 keeps one for each input.
    axes: ClassVar[dict[str, tuple[str | None, ...]]] = {**LoRAAdapter.axes, "lora_A": (None, None)}

    @staticmethod
    def serves(module: nn.Module) -> bool:
        """Whether ``module`` is an embedding."""
        return isinstance(module, nn.Embedding)

    @staticmethod
    def refusal(host: nn.Module, r: int, dropout: float, freeze_A: bool) -> str | None:
        """Refuse what changes the weight while it is read, and an A that would stay zero."""
        if host.max_norm is not None:
            return f"it is an embedding with max_norm={host.max_norm}, which rewrites its weight while it is read"
        return "freeze_A was given, but A of an embedding starts at zero" if freeze_A else None

    def reset_parameters(self) -> None:
        """Set A to zero and draw B from N(0, 1): the other way round than beside a linear layer."""
        with torch.no_grad():
            self.lora_A.zero_()
        fill(self.lora_B, self._seed, self._name, lambda values, g: nn.init.normal_(values, generator=g))

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Add the low-rank term to ``output`` ``[..., dim]``."""
        assert isinstance(base, nn.Embedding)
        # Also beside one with sparse gradients: A is stored by rank, and its gradient cannot be sparse by tokens.
        hidden = functional.embedding(  # [..., r]
            input_of(args, kwargs), self.lora_A.T, base.padding_idx, None, 2.0, base.scale_grad_by_freq
        )
        delta = functional.linear(hidden, self.lora_B.to(hidden.dtype))
        # Gemma multiplies what it looks up: the low-rank term has to be in the same units.
        return (output + delta * (self.scale * getattr(base, "embed_scale", 1.0))).to(output.dtype)
