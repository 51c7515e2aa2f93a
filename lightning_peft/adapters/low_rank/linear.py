"""The low-rank change of a linear layer: LoRA (Hu et al., 2021), arXiv:2106.09685, section 4.1."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_peft.adapters.low_rank.products import add_low_rank, frozen_matrix, is_large, product_dtype
from lightning_peft.adapters.low_rank.shared_input import Member, SharedInput
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.calls import add_scaled, input_of, with_input
from lightning_peft.tensors.seeding import fill
from lightning_peft.tensors.sharding import alongside
from lightning_peft.tensors.weights import features, is_linear, tensor_options


class LoRAAdapter(Adapter):
    """h = W0 x + scale · B A x (equation 3); x ``[..., in]``, A ``[r, in]``, B ``[out, r]``."""

    mergeable = True
    folds_by_row = True
    axes: ClassVar[dict[str, tuple[str | None, ...]]] = {"lora_A": (None, "in"), "lora_B": ("out", None)}

    def __init__(self, host: nn.Module, r: int, scale: float, dropout: float, init: str, seed: int, name: str):
        super().__init__()
        shapes = self.shapes(host, r)
        options = tensor_options(host)
        self.lora_A = nn.Parameter(torch.empty(shapes["lora_A"], **options))
        self.lora_B = nn.Parameter(torch.empty(shapes["lora_B"], **options))
        self.scale, self.dropout = scale, dropout
        self.shared_input = SharedInput(self)
        self._init, self._seed, self._name = init, seed, name
        self.reset_parameters()

    @staticmethod
    def serves(module: nn.Module) -> bool:
        """Whether ``module`` is of the kind that this class adapts."""
        return is_linear(module)

    @staticmethod
    def shapes(host: nn.Module, r: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of every parameter beside ``host``, by name: that of HF PEFT's files."""
        d_in, d_out = features(host)
        return {"lora_A": (r, d_in), "lora_B": (d_out, r)}

    @staticmethod
    def refusal(host: nn.Module, r: int, dropout: float, freeze_A: bool) -> str | None:
        """Return why ``host`` cannot be adapted with these hyper-parameters and what to do, if it cannot."""
        return None

    def reset_parameters(self) -> None:
        """Draw A and set B to zero.

        ``kaiming`` draws A from U(-1/sqrt(in), 1/sqrt(in)) as the paper's own code does, ``gaussian`` from
        N(0, 1/r²): the paper's text says Gaussian and gives no width.
        """
        with torch.no_grad():
            self.lora_B.zero_()
        fill(self.lora_A, self._seed, self._name, self._draw)

    def freeze_A(self) -> None:
        """Make A a buffer: not trained, but saved."""
        frozen = self.lora_A.detach()
        del self.lora_A
        self.register_buffer("lora_A", frozen)

    def _draw(self, values: Tensor, generator: torch.Generator) -> None:
        if self._init == "kaiming":
            nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
        else:
            nn.init.normal_(values, std=1 / len(values), generator=generator)

    def joins(self, other: Member) -> bool:
        """Whether one product with the A of both can serve both, if they are given the same input."""
        mine, others = self.lora_A, other.lora_A
        same = (self.dropout, self.training, mine.dtype) == (other.dropout, other.training, others.dtype)
        return same and type(mine) is type(others) and mine.shape[1:] == others.shape[1:]

    def before(
        self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Have a frozen layer run without a graph: :meth:`forward` computes its dX as well."""
        if torch.compiler.is_compiling():
            return args, kwargs
        shared = self.shared_input
        shared.begin()
        # First what is quickest, and so in narrow models for all layers: their time is Python's.
        x = input_of(args, kwargs)
        if not is_large(x, self.dropout > 0 and self.training):
            return args, kwargs
        # In training also without gradients: reentrant checkpointing runs once so, and has to see the same dropout.
        if not (torch.is_grad_enabled() or (self.training and not torch.is_inference_mode_enabled())):
            return args, kwargs
        dtype = product_dtype(base, x, self.lora_A, self.lora_B)
        if dtype is None:
            return args, kwargs
        weight = frozen_matrix(base)
        read = shared.read(x, dtype, weight)
        return (args, kwargs) if weight is None else with_input(args, kwargs, read)

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Add the low-rank term to ``output`` ``[..., out]``."""
        shared, compiles = self.shared_input, torch.compiler.is_compiling()
        if not compiles and shared.has_read():
            return shared.add(self, output)
        x, a, b = input_of(args, kwargs), self.lora_A, self.lora_B
        if not (self.training or torch.is_grad_enabled()) and product_dtype(base, x, a, b) is not None:
            return add_low_rank(output, x, a, b, self.scale)
        # In a narrow model every call counts, also of what would do nothing.
        if self.dropout and self.training:
            x = functional.dropout(x, self.dropout, self.training)
        # The small matrices follow the activations: casting x instead would cost a float32 copy of it.
        hidden = functional.linear(x, a if a.dtype == x.dtype else a.to(x.dtype))  # [..., r]
        if compiles:
            # A number that a tensor is multiplied by can be a variable of the program, so that adapters of other scales
            # need no other one; `alpha` is part of it.
            hidden = hidden * self.scale
        delta = functional.linear(hidden, b if b.dtype == hidden.dtype else b.to(hidden.dtype))  # [..., out]
        changed = output + delta if compiles else torch.add(output, delta, alpha=self.scale)
        return changed if changed.dtype == output.dtype else changed.to(output.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return W0 + scale · B A (section 4.1, "No Additional Inference Latency")."""
        a, b = (matrix.detach().to(weight.dtype) for matrix in (self.lora_A, self.lora_B))
        # Not as `alpha`, with which a compiled program that folds, as DoRA's does for its norms, would serve one scale.
        return torch.addmm(weight, b * self.scale, a), bias

    def extra_repr(self) -> str:
        """Show what parameters do not."""
        return f"scale={self.scale:g}, dropout={self.dropout:g}"


class BiasedLoRAAdapter(LoRAAdapter):
    """h = W0 x + scale · (B A x + b); b ``[out]``, zero at the start."""

    adds_bias = True
    folds_by_row = False
    axes: ClassVar[dict[str, tuple[str | None, ...]]] = {**LoRAAdapter.axes, "lora_B_bias": ("out",)}

    def __init__(self, host: nn.Module, *args: Any) -> None:
        super().__init__(host, *args)
        shape = self.shapes(host, 1)["lora_B_bias"]
        self.lora_B_bias = nn.Parameter(torch.zeros(shape, **tensor_options(host)))

    @staticmethod
    def shapes(host: nn.Module, r: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of A, B and the bias."""
        shapes = LoRAAdapter.shapes(host, r)
        return {**shapes, "lora_B_bias": shapes["lora_B"][:1]}

    def reset_parameters(self) -> None:
        """Draw A, and set B and the bias to zero."""
        super().reset_parameters()
        if "lora_B_bias" in self._parameters:  # not yet while the matrices are made
            nn.init.zeros_(self.lora_B_bias)

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Add the low-rank term and the bias to ``output`` ``[..., out]``."""
        changed = super().forward(base, args, kwargs, output)
        return add_scaled(changed, self.lora_B_bias.to(changed.dtype), self.scale)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return W0 + scale · B A, and the layer's bias with scale · b in it."""
        weight, bias = super().fold(weight, bias)
        own = self.scale * self.lora_B_bias.detach().to(weight.dtype)
        return weight, own if bias is None else bias + own


class ActivatedLoRAAdapter(LoRAAdapter):
    """h = W0 x + scale · B A x for some tokens, and W0 x for all others (aLoRA, arXiv:2504.12397, section 3)."""

    mergeable = False
    by_row = False
    folds_by_row = False
    # The layer runs as it is: what is saved by having it share products is little beside what it leaves out.
    before = Adapter.before
    active: Callable[[Tensor], Tensor]
    """Says for which tokens, bool ``[..., 1]``, by the layer's input ``[..., in]``; set by what makes the adapter."""

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Add the low-rank term to ``output`` ``[..., out]`` where the token is active."""
        x = input_of(args, kwargs)
        dropped = functional.dropout(x, self.dropout, self.training)
        hidden = functional.linear(dropped, self.lora_A.to(x.dtype))  # [..., r]
        hidden = torch.where(alongside(hidden, self.active(x)), hidden, 0)
        delta = functional.linear(hidden, self.lora_B.to(hidden.dtype))  # [..., out]
        return add_scaled(output, delta, self.scale).to(output.dtype)
