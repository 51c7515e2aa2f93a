"""MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure (Kang and Yin, 2026).

arXiv:2409.15371, in the form that it calls MiSSᵉ; the first versions of the paper call it Bone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_peft.core.adapter import Adapter
from lightning_peft.core.calls import input_of
from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.targets.select import select
from lightning_peft.tensors.sharding import in_one_piece
from lightning_peft.tensors.weights import features, is_linear, tensor_options


class MiSSAdapter(Adapter):
    """h = W0 x + Sᵀ Σ x_i; x_i are the shards of x, of r features each, S ``[r, out]``.

    The last shard is filled up with zeros. S may be of fewer columns, which are then repeated.
    """

    mergeable = True
    folds_by_row = True
    axes: ClassVar[dict[str, tuple[str | None, ...]]] = {"miss_block": (None, None)}

    def __init__(self, host: nn.Module, r: int, columns: int, dropout: float) -> None:
        super().__init__()
        self.d_in, self.d_out = features(host)
        self.miss_block = nn.Parameter(torch.empty(r, columns, **tensor_options(host)))
        self.dropout = dropout
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set S to zero."""
        nn.init.zeros_(self.miss_block)

    def _shared(self, dtype: torch.dtype) -> Tensor:
        """Return S, ``[r, out]``."""
        columns = self.miss_block.shape[1]
        return self.miss_block.to(dtype).repeat(1, self.d_out // columns)

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Add what S makes of the sum of the input's shards to ``output`` ``[..., out]``."""
        x = functional.dropout(in_one_piece(input_of(args, kwargs)), self.dropout, self.training)
        r = len(self.miss_block)
        shards = functional.pad(x, (0, -self.d_in % r)).unflatten(-1, (-1, r))
        return (output + in_one_piece(shards.sum(-2) @ self._shared(x.dtype))).to(output.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return W0 with Sᵀ added to every r of its columns."""
        repeats = -(-self.d_in // len(self.miss_block))
        rows = self._shared(weight.dtype).detach().T[self.rows_from : self.rows_from + len(weight)]
        return weight + rows.repeat(1, repeats)[:, : self.d_in], bias


@dataclass(frozen=True, kw_only=True)
class MiSS(PEFTMethod):
    """One small matrix for each linear layer, which all shards of the layer's input share.

    Args:
        r: Features in a shard, and the rank of the change. With 16, a square layer has as many parameters as under
            LoRA with 8.
        mini_r: Columns of the matrix, which are repeated over the outputs; all different, if not given.
        dropout: Probability with which an element of the adapter's input is zeroed during training.
        target_modules: What to adapt: ``all-linear`` (every linear layer but a language model's head), ``attention``,
            ``mlp``, or names, globs and regular expressions (``re:.*proj``). HF PEFT has no MiSS for ``Conv1D``:
            files of these are in a format of our own.
        exclude_modules: Patterns of modules to leave out, with what is in them.
        layers: Blocks to adapt: indices, or a slice such as ``"8:16"`` or ``"-4:"``.
    """

    name: ClassVar[str] = "miss"
    hosts: ClassVar[str] = "linear layers"
    count: ClassVar[str] = "Σ r out"

    r: int = 16
    mini_r: int | None = None
    dropout: float = 0.0
    target_modules: list[str] | str = "all-linear"
    exclude_modules: list[str] | str | None = None
    layers: list[int] | str | None = None

    def __post_init__(self) -> None:
        for what, value in (("r", self.r), ("mini_r", 1 if self.mini_r is None else self.mini_r)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise PEFTError(f"MiSS: {what}={value!r} was given; it is a whole number of at least 1.")
        if not 0 <= self.dropout < 1:
            raise PEFTError(f"MiSS: dropout={self.dropout!r} was given; it is a probability in [0, 1).")

    def select(self, model: ModelView) -> dict[str, nn.Module]:
        """Return the linear layers that ``target_modules`` names."""
        return select(
            model,
            self.target_modules,
            adaptable=is_linear,
            obstacle=self._obstacle,
            exclude=self.exclude_modules,
            layers=self.layers,
        )

    def adapter(self, name: str, module: nn.Module, seed: int) -> MiSSAdapter:
        """Make the adapter of the linear layer ``module``."""
        return MiSSAdapter(module, self.r, self.mini_r or features(module)[1], self.dropout)

    def _obstacle(self, name: str, host: nn.Module) -> str | None:
        d_in, d_out = features(host)
        if d_in < self.r:
            return f"it has {d_in} inputs, which make no shard of r={self.r}"
        if self.mini_r is not None and d_out % self.mini_r:
            return f"it has {d_out} outputs, which mini_r={self.mini_r} does not divide"
        return None
