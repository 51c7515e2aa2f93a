"""LoKr: Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation (Yeh et al., 2024).

arXiv:2309.14859, section 3.2 (equation 4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.adapters.low_rank.conv import convolved, kernel_of, with_core
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.calls import add_scaled, input_of
from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.methods.loha import is_factored
from lightning_peft.targets.select import select
from lightning_peft.tensors.seeding import fill
from lightning_peft.tensors.sharding import full_shape, in_one_piece
from lightning_peft.tensors.weights import features, is_conv, tensor_options, weight_of

Shape = tuple[int, int]


class LoKrAdapter(Adapter):
    """h = W0 x + scale · (W1 ⊗ W2) x; W1 ``[l, m]`` and W2 ``[out / l, in / m]``, each whole or a product of rank r."""

    mergeable = True
    folds_by_row = True
    axes: ClassVar[dict[str, tuple[str | None, ...]]] = {
        f"lokr_{factor}{half}": (None, None) for factor in ("w1", "w2") for half in ("", "_a", "_b")
    }

    def __init__(
        self,
        host: nn.Module,
        shapes: dict[str, tuple[int, ...]],
        scale: float,
        seed: int,
        name: str,
    ) -> None:
        """Make the factors of ``shapes``, by name; those with a rank as two halves, ``lokr_w2_a`` and ``lokr_w2_b``."""
        super().__init__()
        options = tensor_options(host)
        for key, shape in shapes.items():
            self.register_parameter(key, nn.Parameter(torch.empty(shape, **options)))
        self.scale, self._seed, self._name = scale, seed, name
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set W1, or its left half, to zero; draw the rest from U(-1/sqrt(columns), 1/sqrt(columns)), as HF PEFT."""
        for key, parameter in self.named_parameters():
            if key in ("lokr_w1", "lokr_w1_a"):
                nn.init.zeros_(parameter)
            else:
                fill(parameter, self._seed, f"{self._name}.{key}", _draw)

    def _factor(self, factor: str, dtype: torch.dtype) -> Tensor:
        whole = self._parameters.get(factor)
        if whole is not None:
            return whole.flatten(1).to(dtype)
        return (self.get_parameter(f"{factor}_a") @ self.get_parameter(f"{factor}_b")).to(dtype)

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Add what the Kronecker product makes of the input to ``output`` ``[..., out]``; it is never made itself."""
        # Rows and columns of a factor need not be divisible by a number of processes.
        x = in_one_piece(input_of(args, kwargs))
        left, right = (self._factor(factor, x.dtype) for factor in ("lokr_w1", "lokr_w2"))
        columns = x.unflatten(-1, (left.shape[1], right.shape[1]))  # [..., m, in / m]
        delta = (left @ (columns @ right.T)).flatten(-2)  # [..., l, out / l], then [..., out]
        return add_scaled(output, in_one_piece(delta), self.scale).to(output.dtype)

    def _product(self, start: int, length: int, like: Tensor) -> Tensor:
        """Return so many rows of W1 ⊗ W2, in the dtype of ``like``."""
        left, right = (self._factor(factor, like.dtype) for factor in ("lokr_w1", "lokr_w2"))
        rows = torch.arange(start, start + length, device=like.device)
        return (left[rows // len(right), :, None] * right[rows % len(right), None]).flatten(1)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return W0 + scale · (W1 ⊗ W2)."""
        product = self._product(self.rows_from, len(weight), weight).detach()
        return torch.add(weight, product, alpha=self.scale), bias


class ConvLoKrAdapter(LoKrAdapter):
    """The same beside a convolution, whose kernel W2 has: ``[out / l, in / m, *kernel]``.

    W2 may be that of a core T ``[r, r, *kernel]`` with halves ``[r, out / l]`` and ``[r, in / m]``.
    """

    folds_by_row = False

    def _factor(self, factor: str, dtype: torch.dtype) -> Tensor:
        core = self._parameters.get("lokr_t2") if factor == "lokr_w2" else None
        if core is None:
            return super()._factor(factor, dtype)
        return with_core(core, self.get_parameter("lokr_w2_a"), self.get_parameter("lokr_w2_b")).to(dtype)

    def _product(self, start: int, length: int, like: Tensor) -> Tensor:
        whole = self._parameters.get("lokr_w2")
        if whole is None or whole.dim() != 3:
            return super()._product(start, length, like)
        # HF PEFT's files of one dimension mean the product that torch has for tensors of two and of three.
        return torch.kron(self._factor("lokr_w1", like.dtype), whole.to(like.dtype)).reshape(length, -1)

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Add what the Kronecker product makes of the input to ``output`` ``[batch, out, ...]``."""
        x, shape = input_of(args, kwargs), full_shape(weight_of(base))
        delta = convolved(base, x, self._product(0, shape[0], x).view(shape))
        return add_scaled(output, delta, self.scale).to(output.dtype)


@dataclass(frozen=True, kw_only=True)
class LoKr(PEFTMethod):
    """Updates of linear layers, and by name of convolutions: Kronecker products of a small matrix and a low-rank one.

    Args:
        r: Rank of the factors. One that it would not make smaller is trained whole: with ``r`` of half its longer side
            or more, or the first one without ``decompose_both``.
        alpha: The update is multiplied by ``alpha / r``.
        decompose_both: Give the first, smaller factor the rank ``r`` as well.
        decompose_factor: Rows and columns of the first factor, where they divide those of the weight; else the largest
            divisors below it. -1 makes both factors as square as possible.
        target_modules: What to adapt: ``all-linear`` (every linear layer but a language model's head), ``attention``,
            ``mlp``, or names, globs and regular expressions (``re:.*proj``). HF PEFT has no LoKr for ``Conv1D``:
            files of these are in a format of our own.
        use_effective_conv2d: Factor a convolution's kernel apart from its channels, where it has more than one place
            and the second factor the rank ``r``.
        exclude_modules: Patterns of modules to leave out, with what is in them.
        layers: Blocks to adapt: indices, or a slice such as ``"8:16"`` or ``"-4:"``.
    """

    name: ClassVar[str] = "lokr"
    hosts: ClassVar[str] = "linear layers, convolutions"
    count: ClassVar[str] = "Σ l m + r (out / l + in / m)"
    # The names of the tensors show it.
    free: ClassVar[frozenset[str]] = PEFTMethod.free | {"use_effective_conv2d"}

    r: int = 8
    alpha: float = 8
    decompose_both: bool = False
    decompose_factor: int = -1
    target_modules: list[str] | str = "all-linear"
    use_effective_conv2d: bool = False
    exclude_modules: list[str] | str | None = None
    layers: list[int] | str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise PEFTError(f"LoKr: r={self.r!r} was given; a rank is a whole number of at least 1.")
        if not (isinstance(self.alpha, int | float) and math.isfinite(self.alpha) and self.alpha > 0):
            raise PEFTError(f"LoKr: alpha={self.alpha!r} was given; alpha is a positive number.")
        factor = self.decompose_factor
        if not isinstance(factor, int) or isinstance(factor, bool) or (factor != -1 and factor < 1):
            raise PEFTError(
                f"LoKr: decompose_factor={factor!r} was given; it is a whole number of at least 1, or -1 for factors "
                "as square as possible."
            )

    def select(self, model: ModelView) -> dict[str, nn.Module]:
        """Return the layers that ``target_modules`` names."""
        return select(
            model, self.target_modules, adaptable=is_factored, exclude=self.exclude_modules, layers=self.layers
        )

    def shapes(self, module: nn.Module) -> dict[str, Shape]:
        """Return the shapes of W1 and W2 for ``module``, by name; of a convolution at one place of its kernel."""
        d_in, d_out = features(module)
        d_in //= math.prod(_kernel(module))
        (out_small, out_large), (in_small, in_large) = (_split(d, self.decompose_factor) for d in (d_out, d_in))
        return {"lokr_w1": (out_small, in_small), "lokr_w2": (out_large, in_large)}

    def ranks(self, module: nn.Module) -> dict[str, int | None]:
        """Return the rank of each, or ``None`` if it is trained whole; decided as HF PEFT does, whose files show it."""
        low = {factor: self.r < max(shape) / 2 for factor, shape in self.shapes(module).items()}
        return {
            "lokr_w1": self.r if self.decompose_both and low["lokr_w1"] else None,
            "lokr_w2": self.r if low["lokr_w2"] else None,
        }

    def parameters_of(self, module: nn.Module) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the parameters of the adapter of ``module``, by name."""
        found: dict[str, tuple[int, ...]] = {}
        for (factor, (rows, columns)), r in zip(self.shapes(module).items(), self.ranks(module).values(), strict=True):
            kernel = _kernel(module) if factor == "lokr_w2" else ()
            sides = kernel_of(module) if self.use_effective_conv2d and kernel else None
            if r is None:
                found[factor] = rows, columns, *kernel
            elif sides:
                found |= {f"{factor}_a": (r, rows), f"{factor}_b": (r, columns), "lokr_t2": (r, r, *sides)}
            else:
                found |= {f"{factor}_a": (rows, r), f"{factor}_b": (r, columns * math.prod(kernel))}
        return found

    def adapter(self, name: str, module: nn.Module, seed: int) -> LoKrAdapter:
        """Make the adapter of the layer ``module``."""
        kind = ConvLoKrAdapter if is_conv(module) else LoKrAdapter
        return kind(module, self.parameters_of(module), self.alpha / self.r, seed, name)


def _kernel(module: nn.Module) -> tuple[int, ...]:
    return module.kernel_size if isinstance(module, nn.Conv1d | nn.Conv2d) else ()


def _split(size: int, factor: int) -> Shape:
    """Return two divisors of ``size``: ``factor`` and the other, or the largest below it up to their root."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    small = next(divisor for divisor in range(limit, 0, -1) if size % divisor == 0)
    return small, size // small


def _draw(values: Tensor, generator: torch.Generator) -> None:
    nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
