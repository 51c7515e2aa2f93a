"""VeRA: Vector-based Random Matrix Adaptation (Kopiczko et al., 2024), arXiv:2310.11454, section 3.1."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
from lightning_peft.structure.inner_models import InnerModels
from lightning_peft.targets.select import select
from lightning_peft.tensors.weights import features, is_linear, tensor_options


class Projections(nn.Module):
    """The frozen random matrices A ``[r, largest in]`` and B ``[largest out, r]`` that all adapters share."""

    def __init__(self, r: int, d_in: int, d_out: int, seed: int, options: dict[str, Any]) -> None:
        super().__init__()
        self._seed = seed
        self.register_buffer("vera_A", torch.empty(r, d_in, **options))
        self.register_buffer("vera_B", torch.empty(d_out, r, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both from He's uniform distribution, U(-sqrt(6 / fan in), sqrt(6 / fan in))."""
        # As HF PEFT draws them, whose files may hold this seed instead of the matrices.
        generator = torch.Generator().manual_seed(self._seed)
        for matrix in (self.get_buffer("vera_A"), self.get_buffer("vera_B")):
            if not matrix.is_meta:
                bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(matrix.shape[1]))
                matrix.copy_(
                    torch.empty(matrix.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
                )


class VeRAAdapter(Adapter):
    """h = W0 x + b ⊙ B (d ⊙ A x) (equation 2); d ``[r]``, b ``[out]``, and the corners of A and B that fit."""

    mergeable = True
    folds_by_row = True
    axes: ClassVar[dict[str, tuple[str | None, ...]]] = {
        **{"vera_lambda_d": (None,), "vera_lambda_b": ("out",)},
        **{"projections.vera_A": (None, None), "projections.vera_B": (None, None)},
    }

    def __init__(self, host: nn.Module, projections: Projections, r: int, d_initial: float, dropout: float) -> None:
        super().__init__()
        self.d_in, self.d_out = features(host)
        options = tensor_options(host)
        self.vera_lambda_d = nn.Parameter(torch.empty(r, **options))
        self.vera_lambda_b = nn.Parameter(torch.empty(self.d_out, **options))
        self.projections = projections
        self.d_initial, self.dropout = d_initial, dropout
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set b to zero and d to a small constant."""
        nn.init.constant_(self.vera_lambda_d, self.d_initial)
        nn.init.zeros_(self.vera_lambda_b)

    def _corners(self) -> tuple[Tensor, Tensor]:
        a, b = self.projections.get_buffer("vera_A"), self.projections.get_buffer("vera_B")
        return a[:, : self.d_in], b[: self.d_out]

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Add the rescaled random projections of the input to ``output`` ``[..., out]``."""
        x = functional.dropout(input_of(args, kwargs), self.dropout, self.training)
        a, b = (matrix.to(x.dtype) for matrix in self._corners())
        hidden = functional.linear(x, a) * self.vera_lambda_d.to(x.dtype)  # [..., r]
        return (output + functional.linear(hidden, b) * self.vera_lambda_b).to(output.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return W0 + diag(b) B diag(d) A."""
        a, b = (matrix.to(weight.dtype) for matrix in self._corners())
        b = b[self.rows_from : self.rows_from + len(weight)]
        d, rows = (v.detach().to(weight.dtype)[:, None] for v in (self.vera_lambda_d, self.vera_lambda_b))
        return weight + (rows * b) @ (d * a), bias


@dataclass(frozen=True, kw_only=True)
class VeRA(PEFTMethod):
    """Two vectors for each linear layer, which rescale random projections that all layers share.

    Args:
        r: Width of the projections: larger than LoRA's rank, since it costs one number a layer.
        d_initial: Initial value of the inner vector. The outer one is zero.
        projection_seed: Seed of the random projections, whatever the seed of the run. They are saved all the same.
        dropout: Probability with which an element of the adapter's input is zeroed during training.
        target_modules: What to adapt: ``all-linear`` (every linear layer but a language model's head), ``attention``,
            ``mlp``, or names, globs and regular expressions (``re:.*proj``).
        exclude_modules: Patterns of modules to leave out, with what is in them.
        layers: Blocks to adapt: indices, or a slice such as ``"8:16"`` or ``"-4:"``.
    """

    name: ClassVar[str] = "vera"
    hosts: ClassVar[str] = "linear layers, Conv1D"
    count: ClassVar[str] = "Σ (r + out)"
    # The projections are in the files.
    free: ClassVar[frozenset[str]] = PEFTMethod.free | {"d_initial", "projection_seed"}

    r: int = 256
    d_initial: float = 0.1
    projection_seed: int = 0
    dropout: float = 0.0
    target_modules: list[str] | str = "all-linear"
    exclude_modules: list[str] | str | None = None
    layers: list[int] | str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise PEFTError(f"VeRA: r={self.r!r} was given; it is a whole number of at least 1.")
        if not 0 <= self.dropout < 1:
            raise PEFTError(f"VeRA: dropout={self.dropout!r} was given; it is a probability in [0, 1).")
        if not (math.isfinite(self.d_initial) and self.d_initial != 0):
            raise PEFTError(
                f"VeRA: d_initial={self.d_initial!r} was given; it is a number other than 0, at which nothing learns."
            )

    def select(self, model: ModelView) -> dict[str, nn.Module]:
        """Return the linear layers that ``target_modules`` names."""
        return select(model, self.target_modules, adaptable=is_linear, exclude=self.exclude_modules, layers=self.layers)

    def adapters(self, model: ModelView, hosts: Mapping[str, nn.Module], seed: int) -> dict[str, Adapter]:
        """Make the adapters; those of one model share their projections, since it has files of its own."""
        inner = InnerModels(model, hosts)
        groups: dict[str, dict[str, nn.Module]] = {}
        for name, host in hosts.items():
            groups.setdefault(inner.around(name), {})[name] = host
        made: dict[str, Adapter] = {}
        for group in groups.values():
            d_in, d_out = (max(sizes) for sizes in zip(*(features(host) for host in group.values()), strict=True))
            options = tensor_options(next(iter(group.values())))
            shared = Projections(self.r, d_in, d_out, self.projection_seed, options)
            for name, host in group.items():
                made[name] = VeRAAdapter(host, shared, self.r, self.d_initial, self.dropout)
        return made
