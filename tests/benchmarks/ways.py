"""Which way to compute one layer with LoRA is the fastest, forward and backward? Ways that are not taken, beside ours.

*One matrix*: W + s·B·A is made first, and x is multiplied once: the fewest kernels, but the gradient of a whole matrix.
*Fused*: what the adapter adds is added by the product with W itself, in a kernel written in Triton, where there is one.
A and B have the dtype of W; *float32* has them in float32, as users do. On a GPU many calls are timed together, so
that kernels are what is timed where they take longer than Python.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from benchmarks import measure, variants
from benchmarks.report import Options, Table, answer

ONE_MATRIX, FUSED, PLAIN = "one matrix, W + s·B·A", "fused, in Triton", "as the formula is written"
OURS_WIDE = f"{variants.OURS}, float32"
_TOGETHER = 20
"""So many calls have one time."""


@dataclass(frozen=True)
class Layer:
    """A linear layer and how many rows it is given."""

    width: int
    out: int
    rows: int


LAYERS = {
    "SmolLM2, 512 rows": Layer(576, 576, 512),
    "Llama-7B, attention, 4,096 rows": Layer(4096, 4096, 4096),
    "Llama-7B, MLP, 4,096 rows": Layer(4096, 11008, 4096),
}


class Written(nn.Module):
    """A frozen layer and its low-rank change, computed by a function of x, W, A, B and s."""

    def __init__(self, linear: nn.Linear, compute: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weight, self.compute = linear.weight.requires_grad_(False), compute
        r, options = variants.RANK, {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.lora_A = nn.Parameter(torch.randn(r, linear.in_features, **options) / linear.in_features**0.5)
        self.lora_B = nn.Parameter(torch.randn(linear.out_features, r, **options))

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, self.weight, self.lora_A, self.lora_B, variants.ALPHA / variants.RANK)


def plain(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return x Wᵀ + s · (x Aᵀ) Bᵀ."""
    return functional.linear(x, weight) + scale * functional.linear(functional.linear(x, a), b)


def one_matrix(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return x (W + s · B A)ᵀ."""
    return functional.linear(x, torch.addmm(weight, b, a, alpha=scale))


class Fused(torch.autograd.Function):
    """x, W, A, B ↦ x Wᵀ + s · (x Aᵀ) Bᵀ, where the sum is made by the kernel of the large product; W is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """Return the sum; x ``[rows, in]``."""
        from benchmarks.epilogue import product_and

        hidden = x @ a.t()
        ctx.scale = scale
        ctx.save_for_backward(x, weight, a, b, hidden)
        return product_and(x, weight.t(), hidden, b.t(), scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return dX, dA and dB."""
        from benchmarks.epilogue import product_and

        x, weight, a, b, hidden = ctx.saved_tensors
        of_hidden = dy @ b * ctx.scale
        return product_and(dy, weight, of_hidden, a, 1.0), None, of_hidden.t() @ x, dy.t() @ hidden * ctx.scale, None


def ways(device: str) -> dict[str, Callable[[nn.Linear], nn.Module]]:
    """Return what makes of a linear layer what is timed, by name."""
    found: dict[str, Callable[[nn.Linear], nn.Module]] = {
        variants.BOUND: lambda linear: linear.requires_grad_(False),
        variants.OURS: lambda linear: _ours(linear, linear.weight.dtype),
        OURS_WIDE: lambda linear: _ours(linear, torch.float32),
        PLAIN: lambda linear: Written(linear, plain),
        ONE_MATRIX: lambda linear: Written(linear, one_matrix),
    }
    if device == "cuda" and find_spec("triton") is not None:
        found[FUSED] = lambda linear: Written(linear, Fused.apply)
    return found


def _ours(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    stack = nn.Sequential(linear)
    stack.targets = ("0",)
    made = variants.ours(stack, 0.0)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return made


def main(options: Options) -> list[Table]:
    """Time one layer, forward and backward."""
    table = Table("ways", "One layer with LoRA, forward and backward", ["layer", "way", "/ bound", "/ lightning_peft"])
    chosen = dict([next(iter(LAYERS.items()))]) if options.quick or options.device == "cpu" else LAYERS
    for name, layer in chosen.items():
        linear = nn.Linear(layer.width, layer.out, bias=False, device=options.device, dtype=options.dtype)
        hidden = torch.randn(layer.rows, layer.width, device=options.device, dtype=options.dtype, requires_grad=True)
        made = ways(options.device)
        cases = {way: _timed(make(copy.deepcopy(linear)), hidden, options.device) for way, make in made.items()}
        rounds = measure.in_turns(cases, 10 * options.rounds, warmup=5)
        for way in cases:
            beside = [measure.ratios(rounds, way, of, "step") for of in (variants.BOUND, variants.OURS)]
            table.rows.append([name, way, *beside])
    missing = options.device == "cuda" and find_spec("triton") is None
    table.notes += [f"*{FUSED}* is skipped: Triton is not installed."] if missing else []
    return [table]


def _timed(model: nn.Module, hidden: Tensor, device: str) -> measure.Timed:
    # Not of ones or zeros, whose products take less power and so less time.
    gradient = torch.randn_like(model(hidden))

    def run() -> None:
        for _ in range(1 if device == "cpu" else _TOGETHER):
            model(hidden).backward(gradient)
            model.zero_grad(set_to_none=True)
            hidden.grad = None

    def timed() -> Mapping[str, float]:
        return {"step": measure.seconds(run, device)}

    return timed


if __name__ == "__main__":
    answer(main)
