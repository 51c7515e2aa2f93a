"""Bottlenecks on single modules beside the papers' equations in float64."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft import Compacter, ParallelAdapter, PEFTMethod, SeriesAdapter, inject
from lightning_peft.adapters.bottleneck.bottleneck import ACTIVATIONS

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "swish": lambda x: x / (1 + torch.exp(-x)),
    "tanh": lambda x: (torch.exp(x) - torch.exp(-x)) / (torch.exp(x) + torch.exp(-x)),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "identity": lambda x: x,
}
OPTIONS: dict[str, Any] = {"bottleneck": 4, "scale": 1.5, "target_modules": ["0"]}
Weights = dict[str, Tensor]


def bottleneck(x: Tensor, w: Weights, activation: str) -> Tensor:
    """1.5 (f(x W_down + b_down) W_up + b_up), of plain matrices or of sums of Kronecker products."""
    if "slow.phm_A" in w:
        down, up = (
            torch.einsum("ipq,ij,ik->pjqk", w["slow.phm_A"], w[f"{which}_s"], w[f"{which}_t"]).flatten(2).flatten(0, 1)
            for which in ("down", "up")
        )
    else:
        down, up = w["down"], w["up"]
    hidden = torch.einsum("ni,bi->nb", x, down) + w.get("down_bias", torch.zeros(4))
    return 1.5 * (torch.einsum("nb,ob->no", FUNCTIONS[activation](hidden), up) + w.get("up_bias", torch.zeros(1)))


def series(x: Tensor, weight: Tensor, w: Weights, activation: str) -> Tensor:
    h = torch.einsum("ni,oi->no", x, weight)
    return h + bottleneck(h, w, activation)


def parallel(x: Tensor, weight: Tensor, w: Weights, activation: str) -> Tensor:
    return torch.einsum("ni,oi->no", x, weight) + bottleneck(x, w, activation)


CASES: dict[str, tuple[Callable[..., PEFTMethod], Callable[..., Tensor], dict[str, Any]]] = {
    **{
        f"{name} {activation}": (kind, equation, {"activation": activation})
        for activation in ACTIVATIONS
        for name, kind, equation in (("series", SeriesAdapter, series), ("parallel", ParallelAdapter, parallel))
    },
    "series without biases": (SeriesAdapter, series, {"bias": False, "activation": "gelu"}),
    "parallel without biases": (ParallelAdapter, parallel, {"bias": False, "activation": "gelu"}),
    "compacter": (Compacter, series, {"n": 2, "activation": "gelu"}),
    "compacter without biases": (Compacter, series, {"n": 4, "bias": False, "activation": "tanh"}),
}


def differences(case: str, dtype: torch.dtype = torch.float64) -> dict[str, float]:
    """Largest differences of outputs and gradients from the equation in float64, relative to the largest value."""
    make, equation, options = CASES[case]
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(8, 6, generator=generator))
    train_norms = {} if make is ParallelAdapter else {"train_norms": False}
    inject(model, make(**{**OPTIONS, **options, **train_norms}))
    adapter = model[0].peft["default"]
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    assert (adapter.up_bias is not None) == options.get("bias", True)
    x = torch.randn(5, 6, generator=generator, dtype=dtype, requires_grad=True)
    twin = x.detach().double().requires_grad_()
    leaves = {name: p.detach().double().requires_grad_() for name, p in adapter.named_parameters()}

    found = model.to(dtype)(x)
    expected = equation(twin, model[0].weight.detach().double(), leaves, options["activation"])
    found.square().sum().backward()
    expected.square().sum().backward()
    pairs = [(p.grad, leaves[name].grad) for name, p in adapter.named_parameters()] + [(x.grad, twin.grad)]
    assert all(theirs.abs().max() > 0 for _, theirs in pairs)
    return {
        "logits": float((found - expected).abs().max() / expected.abs().max()),
        "gradients": max(float((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in pairs),
    }
