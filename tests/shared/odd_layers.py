"""Layers that derive from torch's and compute something else, or the same in another way, each with an input."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding, BartScaledWordEmbedding


class Activated(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x))


class Masked(nn.Linear):
    """As in autoregressive flows; a weight that has been trained is zero where the mask is, so that it seems plain."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("mask", torch.tril(torch.ones_like(self.weight)))
        with torch.no_grad():
            self.weight.mul_(self.mask)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.mask * self.weight, self.bias)


class Equalised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / math.sqrt(self.in_features), self.bias)


class Cosine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1), self.bias)


class FakeQuantised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        step = self.weight.abs().max() / 7
        return F.linear(x, (self.weight / step).round() * step, self.bias)


class QuantisedInputs(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        step = x.abs().max() / 127
        return super().forward((x / step).round() * step)


class ChannelsFirst(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, -1)).transpose(1, -1)


class WithBias(nn.Linear):
    """Megatron's return their bias beside the output."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, self.weight), self.bias


class Einsum(nn.Linear):
    """Plain, in other words."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", x, self.weight) + self.bias


class Noisy(nn.Linear):
    """Plain but for the noise that it adds in training, with all that a module can keep."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.calls, self.seen, self.inner = 0, Counter[int](), nn.Dropout(0.5)
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen[x.dim()] += 1
        self.total += 1
        noise = torch.randn_like(self.weight) if self.training else 0 * torch.randn_like(self.weight)
        return self.inner(F.linear(x, self.weight + noise, self.bias))


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5), self.bias)


class Same(nn.Conv2d):
    """TensorFlow's padding."""

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        more = [max((math.ceil(n / stride) - 1) * stride + kernel - n, 0) for n in reversed(x.shape[-2:])]
        return super().forward(F.pad(x, [part for m in more for part in (m // 2, m - m // 2)]))


class Causal(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., : -self.padding[0]]


class Own(nn.Module):
    """A linear layer as PyTorch Geometric has it."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))
        self.bias = nn.Parameter(torch.randn(6)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def patched() -> nn.Module:
    """As accelerate and compressed-tensors do it."""
    layer = nn.Linear(8, 8)
    layer.forward = lambda x, forward=layer.forward: forward(2 * x)  # type: ignore[method-assign]
    return layer


def seen_through() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.forward = lambda x, forward=layer.forward: forward(x)  # type: ignore[method-assign]
    return layer


# By name: the nature that is right, how to make one, and the shape of an input (of token numbers for embeddings).
LAYERS: dict[str, tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": ("plain", lambda: nn.Linear(8, 8), (4, 8)),
    "conv": ("plain", lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"), (2, 4, 6, 6)),
    "einsum": ("plain", lambda: Einsum(8, 8), (4, 8)),
    "noisy": ("plain", lambda: Noisy(8, 8), (4, 8)),
    "seen through": ("plain", seen_through, (4, 8)),
    "scaled embedding": ("plain", lambda: BartScaledWordEmbedding(9, 8, 0, embed_scale=3.0), (4,)),
    "weight norm": ("derived", lambda: parametrizations.weight_norm(nn.Linear(8, 8)), (4, 8)),
    "old weight norm": ("derived", lambda: nn.utils.weight_norm(nn.Linear(8, 8)), (4, 8)),
    "spectral norm": ("derived", lambda: parametrizations.spectral_norm(nn.Linear(8, 8)), (4, 8)),
    "spectral norm of a conv": ("derived", lambda: parametrizations.spectral_norm(nn.Conv1d(4, 8, 3)), (2, 4, 6)),
    "old spectral norm": ("derived", lambda: nn.utils.spectral_norm(nn.Linear(8, 8)), (4, 8)),
    "pruned": ("derived", lambda: prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5), (4, 8)),
    "activated": ("beside", lambda: Activated(8, 8), (4, 8)),
    "masked": ("beside", lambda: Masked(8, 8), (4, 8)),
    "equalised": ("beside", lambda: Equalised(8, 8), (4, 8)),
    "cosine": ("beside", lambda: Cosine(8, 8), (4, 8)),
    "fake-quantised": ("beside", lambda: FakeQuantised(8, 8), (4, 8)),
    "quantised inputs": ("beside", lambda: QuantisedInputs(8, 8), (4, 8)),
    "patched": ("beside", patched, (4, 8)),
    "standardised": ("beside", lambda: Standardised(4, 8, 3, padding=1), (2, 4, 6, 6)),
    "channels first": ("neither", lambda: ChannelsFirst(8, 8), (4, 8, 5)),
    "with bias": ("neither", lambda: WithBias(8, 8), (4, 8)),
    "same": ("neither", lambda: Same(4, 8, 3, stride=2), (2, 4, 7, 7)),
    "causal": ("neither", lambda: Causal(4, 8, 3, padding=2), (2, 4, 9)),
    "positions": ("neither", lambda: BartLearnedPositionalEmbedding(9, 8), (2, 3)),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return LAYERS[name][1]()


def given(name: str) -> Tensor:
    shape = LAYERS[name][2]
    torch.manual_seed(1)
    return torch.randint(9, shape) if name in ("scaled embedding", "positions") else torch.randn(shape)
