"""Compacter: Efficient Low-Rank Hypercomplex Adapter Layers (Karimi Mahabadi et al., 2021), arXiv:2106.04647."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_peft.adapters.bottleneck.bottleneck import ACTIVATIONS, Shape
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.calls import on_hidden
from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.methods.series_adapter import SeriesAdapter
from lightning_peft.structure.blocks import find_blocks, widths
from lightning_peft.tensors.seeding import fill
from lightning_peft.tensors.sharding import in_one_piece
from lightning_peft.tensors.weights import tensor_options


class SlowWeights(nn.Module):
    """The matrices A_i that all adapters share; A ``[n, n, n]``, the first index is i."""

    def __init__(self, n: int, options: dict[str, Any], seed: int) -> None:
        super().__init__()
        self.phm_A = nn.Parameter(torch.empty(n, n, n, **options))
        self._seed = seed
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw A from N(0, 0.01²), so that adapters start near the identity."""
        fill(self.phm_A, self._seed, "compacter.phm_A", lambda v, g: nn.init.normal_(v, std=0.01, generator=g))


class CompacterAdapter(Adapter):
    """H <- H + s · (W_up f(W_down H + b_down) + b_up) with W = Σ_i A_i ⊗ (s_i t_iᵀ) (equations 3 and 5).

    Shapes, for hidden states of width d and a bottleneck of b: down_s ``[n, b / n]``, down_t ``[n, d / n]``,
    up_s ``[n, d / n]``, up_t ``[n, b / n]``, biases ``[b]`` and ``[d]``.
    """

    axes: ClassVar[dict[str, tuple[str | None, ...]]] = {
        **{name: (None, None) for name in ("down_s", "down_t", "up_s", "up_t")},
        **{"down_bias": (None,), "up_bias": (None,), "slow.phm_A": (None, None, None)},
    }

    def __init__(self, d: int, shape: Shape, slow: SlowWeights, options: dict[str, Any], seed: int, name: str) -> None:
        super().__init__()
        n, b = len(slow.phm_A), shape.bottleneck
        self.slow = slow
        self.down_s = nn.Parameter(torch.empty(n, b // n, **options))
        self.down_t = nn.Parameter(torch.empty(n, d // n, **options))
        self.up_s = nn.Parameter(torch.empty(n, d // n, **options))
        self.up_t = nn.Parameter(torch.empty(n, b // n, **options))
        self.down_bias = nn.Parameter(torch.empty(b, **options)) if shape.bias else None
        self.up_bias = nn.Parameter(torch.empty(d, **options)) if shape.bias else None
        self.shape, self._seed, self._name = shape, seed, name
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw s_i and t_i by Glorot and Bengio's rule for matrices of one column; biases are zero."""
        self.slow.reset_parameters()
        for key in ("down_s", "down_t", "up_s", "up_t"):
            fill(getattr(self, key), self._seed, f"{self._name}.{key}", _glorot)
        for bias in (self.down_bias, self.up_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Send the hidden state ``[..., d]`` in ``output`` through the adapter."""
        return on_hidden(output, lambda hidden: hidden + self.branch(hidden))

    def branch(self, x: Tensor) -> Tensor:
        """Return what is added to the hidden state ``x`` ``[..., d]``."""
        # The n rows of a hidden state need not be divisible by a number of processes.
        x = functional.dropout(in_one_piece(x), self.shape.dropout, self.training)
        hidden = ACTIVATIONS[self.shape.activation](self._phm(x, self.down_s, self.down_t, self.down_bias))
        return in_one_piece(self._phm(hidden, self.up_s, self.up_t, self.up_bias)) * self.shape.scale

    def _phm(self, x: Tensor, s: Tensor, t: Tensor, bias: Tensor | None) -> Tensor:
        """Return W x + b without forming W: (A_i ⊗ s_i t_iᵀ) x is A_i X t_i s_iᵀ with x as a matrix X of n rows."""
        a, s, t = (tensor.to(x.dtype) for tensor in (self.slow.phm_A, s, t))
        rows = x.unflatten(-1, (len(t), -1)) @ t.T  # [..., n, i]
        mixed = torch.einsum("ipq,...qi->...pi", a, rows)
        y = (mixed @ s).flatten(-2)
        return y if bias is None else y + bias.to(x.dtype)

    def extra_repr(self) -> str:
        """Show what parameters do not."""
        return f"{self.shape.activation}, scale={self.shape.scale:g}, dropout={self.shape.dropout:g}"


@dataclass(frozen=True, kw_only=True)
class Compacter(PEFTMethod):
    """Series adapters whose matrices are sums of Kronecker products, with one factor shared by all of them.

    Args:
        bottleneck: Width of the bottleneck, a multiple of ``n``.
        n: Number of Kronecker products in a matrix; it divides the width of the hidden state.
        placement: After what, in each layer: ``["attention", "mlp"]`` (Compacter) or ``["mlp"]`` (Compacter++), before
            dropout, residual connection and norm. Cross-attention counts as attention; the authors' code has no adapter
            after it.
        activation: The function between the two matrices.
        bias: Whether the two linear maps have biases.
        scale: The adapter's output is multiplied by it.
        dropout: Probability with which an element of the adapter's input is zeroed during training.
        train_norms: Train the LayerNorms of the adapted layers too.
        target_modules: Modules after which to put an adapter, by pattern, instead of a placement.
        exclude_modules: Patterns of modules to leave out, with ``target_modules``.
        layers: Layers to adapt: indices, or a slice such as ``"8:16"`` or ``"-4:"``.
    """

    name: ClassVar[str] = "compacter"
    mergeable: ClassVar[bool] = False
    hosts: ClassVar[str] = "attention, MLP, any module"
    count: ClassVar[str] = "n³ + 3L (d + b) + norms"

    bottleneck: int = 24
    n: int = 4
    placement: list[Literal["attention", "mlp"]] | None = None
    activation: str = "gelu"
    bias: bool = True
    scale: float = 1.0
    dropout: float = 0.0
    train_norms: bool = True
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers: list[int] | str | None = None

    def __post_init__(self) -> None:
        given = ["attention", "mlp"] if self.placement is None else self.placement
        places = [given] if isinstance(given, str) else list(given)
        object.__setattr__(self, "placement", places)
        if not places or set(places) - {"attention", "mlp"}:
            raise PEFTError(f"Compacter: placement={given!r} was given; it is a list of 'attention' and 'mlp'.")
        self._shape()
        if not isinstance(self.n, int) or isinstance(self.n, bool) or self.n < 1:
            raise PEFTError(f"Compacter: n={self.n!r} was given; it is a whole number of at least 1.")
        if self.bottleneck % self.n:
            raise PEFTError(
                f"Compacter: bottleneck={self.bottleneck} was given with n={self.n}; a multiple of n was expected, "
                f"such as {self.bottleneck + self.n - self.bottleneck % self.n}."
            )

    def _shape(self) -> Shape:
        return Shape("Compacter", self.bottleneck, self.activation, self.bias, self.dropout, self.scale)

    def _series(self) -> SeriesAdapter:
        """Return the series adapter that stands in the same places."""
        return SeriesAdapter(
            placement=list(self.placement or ()), train_norms=self.train_norms, target_modules=self.target_modules,
            exclude_modules=self.exclude_modules, layers=self.layers,
        )  # fmt: skip

    def select(self, model: ModelView) -> dict[str, nn.Module]:
        """Return the modules after which there is an adapter."""
        return self._series().select(model)

    def trained(self, model: ModelView) -> Iterable[str]:
        """Return the parameters of the LayerNorms in the adapted layers."""
        return self._series().trained(model)

    def adapters(self, model: ModelView, hosts: Mapping[str, nn.Module], seed: int) -> dict[str, Adapter]:
        """Make one adapter for each host, all with the same slow weights."""
        sizes: dict[str, int] = {}
        if self.target_modules is None:
            sizes = {block.last: block.width for block in find_blocks(model, self.placement or (), self.layers)}
        made: dict[str, Adapter] = {}
        slow: SlowWeights | None = None
        for name, module in hosts.items():
            width, options = sizes.get(name) or widths(model, name)[1], tensor_options(module)
            if width % self.n:
                raise PEFTError(
                    f"Compacter: n={self.n} was given, but {name!r} gives a hidden state of width {width}, which it "
                    "does not divide. Take another n, or exclude the module."
                )
            slow = slow or SlowWeights(self.n, options, seed)
            made[name] = CompacterAdapter(width, self._shape(), slow, options, seed, name)
        return made


def _glorot(values: Tensor, generator: torch.Generator) -> None:
    # Each row is a matrix of one column by itself.
    for row in values:
        nn.init.xavier_uniform_(row[:, None], generator=generator)
