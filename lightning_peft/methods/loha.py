"""LoHa: FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning (Hyeon-Woo et al., 2022).

arXiv:2108.06098, section 2.1; as an adapter: LyCORIS (Yeh et al., 2024), arXiv:2309.14859, section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_peft.adapters.low_rank.conv import convolved, kernel_of, with_core
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.calls import input_of
from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.targets.select import select
from lightning_peft.tensors.seeding import fill
from lightning_peft.tensors.sharding import full_shape
from lightning_peft.tensors.weights import features, is_conv, is_linear, tensor_options, weight_of


class LoHaAdapter(Adapter):
    """h = W0 x + scale · ((W1a W1b) ⊙ (W2a W2b)) x; Wa ``[out, r]``, Wb ``[r, in]``: of a rank up to r²."""

    mergeable = True
    folds_by_row = True
    axes: ClassVar[dict[str, tuple[str | None, ...]]] = {
        **{"hada_w1_a": ("out", None), "hada_w1_b": (None, "in")},
        **{"hada_w2_a": ("out", None), "hada_w2_b": (None, "in")},
    }

    hada_w1_a: nn.Parameter
    hada_w1_b: nn.Parameter
    hada_w2_a: nn.Parameter
    hada_w2_b: nn.Parameter

    def __init__(self, host: nn.Module, shapes: dict[str, tuple[int, ...]], scale: float, seed: int, name: str) -> None:
        super().__init__()
        for key, shape in shapes.items():
            self.register_parameter(key, nn.Parameter(torch.empty(shape, **tensor_options(host))))
        self.scale, self._seed, self._name = scale, seed, name
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set W2b to zero; draw the rest from U(-1/sqrt(columns), 1/sqrt(columns)), as HF PEFT."""
        for key, parameter in self.named_parameters():
            if key == "hada_w2_b":
                nn.init.zeros_(parameter)
            else:
                fill(parameter, self._seed, f"{self._name}.{key}", _draw)

    def _products(self) -> tuple[Tensor, Tensor]:
        return self.hada_w1_a @ self.hada_w1_b, self.hada_w2_a @ self.hada_w2_b

    def _delta(self, dtype: torch.dtype) -> Tensor:
        """Return the change of the weight, ``[out, in]``."""
        first, second = self._products()
        return (first * second * self.scale).to(dtype)

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Add what the change of the weight makes of the input to ``output`` ``[..., out]``."""
        x = input_of(args, kwargs)
        return (output + functional.linear(x, self._delta(x.dtype))).to(output.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the changed weight."""
        return weight + self._delta(weight.dtype).detach(), bias


class ConvLoHaAdapter(LoHaAdapter):
    """The same beside a convolution: a column for each channel and place of the kernel.

    Or either product is that of a core T ``[r, r, *kernel]`` with Wa ``[r, out]`` and Wb ``[r, in / groups]``.
    """

    folds_by_row = False
    axes: ClassVar[dict[str, tuple[str | None, ...]]] = {}

    def _products(self) -> tuple[Tensor, Tensor]:
        if "hada_t1" not in self._parameters:
            return super()._products()
        first = with_core(self.get_parameter("hada_t1"), self.hada_w1_a, self.hada_w1_b)
        return first, with_core(self.get_parameter("hada_t2"), self.hada_w2_a, self.hada_w2_b)

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Add what the change of the weight makes of the input to ``output`` ``[batch, out, ...]``."""
        x = input_of(args, kwargs)
        change = self._delta(x.dtype).view(full_shape(weight_of(base)))
        return (output + convolved(base, x, change)).to(output.dtype)


@dataclass(frozen=True, kw_only=True)
class LoHa(PEFTMethod):
    """Updates of linear layers, and by name of convolutions, that are the Hadamard product of two of low rank.

    Args:
        r: Rank of each of the two.
        alpha: The update is multiplied by ``alpha / r``.
        target_modules: What to adapt: ``all-linear`` (every linear layer but a language model's head), ``attention``,
            ``mlp``, or names, globs and regular expressions (``re:.*proj``). HF PEFT has no LoHa for ``Conv1D``:
            files of these are in a format of our own.
        use_effective_conv2d: Factor a convolution's kernel apart from its channels, where it has more than one place.
        exclude_modules: Patterns of modules to leave out, with what is in them.
        layers: Blocks to adapt: indices, or a slice such as ``"8:16"`` or ``"-4:"``.
    """

    name: ClassVar[str] = "loha"
    hosts: ClassVar[str] = "linear layers, convolutions"
    count: ClassVar[str] = "Σ 2r (in + out)"
    # The names of the tensors show it.
    free: ClassVar[frozenset[str]] = PEFTMethod.free | {"use_effective_conv2d"}

    r: int = 8
    alpha: float = 8
    target_modules: list[str] | str = "all-linear"
    use_effective_conv2d: bool = False
    exclude_modules: list[str] | str | None = None
    layers: list[int] | str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise PEFTError(f"LoHa: r={self.r!r} was given; a rank is a whole number of at least 1.")
        if not (isinstance(self.alpha, int | float) and math.isfinite(self.alpha) and self.alpha > 0):
            raise PEFTError(f"LoHa: alpha={self.alpha!r} was given; alpha is a positive number.")

    def select(self, model: ModelView) -> dict[str, nn.Module]:
        """Return the layers that ``target_modules`` names."""
        return select(
            model, self.target_modules, adaptable=is_factored, exclude=self.exclude_modules, layers=self.layers
        )

    def adapter(self, name: str, module: nn.Module, seed: int) -> LoHaAdapter:
        """Make the adapter of the layer ``module``."""
        kind = ConvLoHaAdapter if is_conv(module) else LoHaAdapter
        return kind(module, self.shapes(module), self.alpha / self.r, seed, name)

    def shapes(self, module: nn.Module) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the parameters of the adapter of ``module``, by name."""
        if self.use_effective_conv2d and isinstance(module, nn.Conv1d | nn.Conv2d) and (kernel := kernel_of(module)):
            core = (self.r, self.r, *kernel)
            left, right = (self.r, module.out_channels), (self.r, module.in_channels // module.groups)
            cores: dict[str, tuple[int, ...]] = {"hada_t1": core, "hada_t2": core}
        else:
            d_in, d_out = features(module)
            left, right, cores = (d_out, self.r), (self.r, d_in), {}
        return {"hada_w1_a": left, "hada_w1_b": right, "hada_w2_a": left, "hada_w2_b": right, **cores}


def is_factored(module: nn.Module) -> bool:
    """Whether LoHa and LoKr are for ``module``: a linear layer, or a convolution in one or two dimensions."""
    return is_linear(module) or isinstance(module, nn.Conv1d | nn.Conv2d)


def _draw(values: Tensor, generator: torch.Generator) -> None:
    nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
