"""Whether a module computes its weight's plain function: only then does a change of the weight do what an adapter adds.

A class that derives from ``nn.Linear`` may compute anything: with an activation, a mask, a weight that is normalised or
quantised while it is read. What it computes is seen by running it on another weight, with a few small inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from lightning_peft.core.to_the_end import to_the_end
from lightning_peft.tensors.packed import is_packed
from lightning_peft.tensors.shadow import shadow, unshadow
from lightning_peft.tensors.sharding import full_shape, in_zero_pieces
from lightning_peft.tensors.weights import (
    conv1d_class,
    features,
    is_conv,
    is_conv1d,
    is_linear,
    is_script,
    tensor_options,
    weight_of,
)

Nature = Literal["plain", "derived", "beside", "neither"]

# Relative to the largest output. The same kernel gives the same numbers; inputs rounded to 8 bits are 30 times as far.
_TOLERANCE = 1e-4
_KNOWN = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def nature(module: nn.Module) -> Nature:
    """Return what a linear layer, an embedding or a convolution computes, by its class or as far as can be seen.

    ``plain``
        The plain function of its weight, whatever values that has: a change can be merged into it.
    ``derived``
        The plain function of a weight that is worked out from others: weight norm, spectral norm, parametrizations,
        pruning.
    ``beside``
        Another function, to which what an adapter makes of the same input can be added.
    ``neither``
        One to which that cannot be added, for its shape.
    """
    has_weight = module._parameters.get("weight") is not None
    if _inherits_forward(module):
        return "plain" if has_weight else "derived"
    if is_packed(module) or _is_out_of_reach(module):
        return "beside"
    return _tried(module, has_weight)


def is_own_linear(module: nn.Module) -> bool:
    """Whether a module of a class of somebody's own computes x Wᵀ + b, as PyTorch Geometric's ``Linear`` does."""
    if is_script(module):
        return False
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    others = [name for name, parameter in module._parameters.items() if parameter is not None]
    if weight is None or len(full_shape(weight)) != 2 or set(others) - {"weight", "bias"} or is_weighted(module):
        return False
    if bias is not None and full_shape(bias) != full_shape(weight)[:1]:
        return False
    return nature(module) == "plain"


def is_plain_no_more(module: nn.Module) -> bool:
    """Whether ``module``, which was ``plain`` once, has got another class or a ``forward`` that computes otherwise."""
    return not _is_out_of_reach(module) and nature(module) != "plain"


def obstacle(module: nn.Module) -> str | None:
    """Return why no adapter can add to what ``module`` returns, if it is TorchScript or :func:`nature` judges it."""
    if is_script(module):
        return "it is TorchScript, to which nothing can be attached"
    if not is_weighted(module):
        return None
    if 0 in features(module):
        return "its weight is empty"
    if nature(module) != "neither":
        return None
    what = "a lookup of it" if isinstance(module, nn.Embedding) else "of the shape that its weight gives"
    return f"what a {type(module).__name__} makes of its input is not {what}"


def is_weighted(module: nn.Module) -> bool:
    """Whether ``module`` is of a kind that :func:`nature` judges."""
    return is_linear(module) or is_conv(module) or isinstance(module, nn.Embedding)


def _inherits_forward(module: nn.Module) -> bool:
    """Whether ``module`` runs the code of torch's own class, or of transformers' ``Conv1D``."""
    if "forward" in module.__dict__:
        return False
    known = next((kind for kind in _KNOWN if isinstance(module, kind)), None) or conv1d_class()
    return all(getattr(type(module), name, None) is getattr(known, name, None) for name in ("forward", "_conv_forward"))


def _is_out_of_reach(module: nn.Module) -> bool:
    """Whether weights of ``module`` have no values, or each process a piece of them, so that it cannot be tried."""
    tensors = (*module.parameters(), *module.buffers())
    return any(t.is_meta or isinstance(t, DTensor) or in_zero_pieces(t) for t in tensors)


def _tried(module: nn.Module, has_weight: bool) -> Nature:
    """Return what :func:`nature` does, from what ``module`` makes of a few inputs and another weight."""
    ran, plain = False, has_weight
    with _undisturbed(module):
        shadows = shadow(module, _other_weights(module) if has_weight else {})
        try:
            for given in _inputs(module, weight_of(module)):
                output = _output(module.forward, given)
                if output is None:
                    continue
                expected = _output(lambda x: _plain(module, x), given)
                if not isinstance(output, Tensor) or expected is None or output.shape != expected.shape:
                    return "neither"
                ran, plain = True, plain and bool((output - expected).abs().max() <= _TOLERANCE * expected.abs().max())
        finally:
            unshadow(shadows)
    if ran and plain:
        return "plain"
    # A low-rank term of an embedding is a lookup too: beside anything else it would mean nothing.
    return "neither" if isinstance(module, nn.Embedding) else "beside"


def _output(function: Any, given: Tensor) -> Any:
    """Return what ``function`` makes of ``given``, or ``None`` where it takes no such input."""
    try:
        return function(given)
    except Exception:  # whatever somebody's layer raises on a shape that it is not made for
        return None


def _plain(module: nn.Module, x: Tensor) -> Tensor:
    """Return the plain function of the weight that ``module`` reads."""
    weight, bias = weight_of(module), getattr(module, "bias", None)
    if isinstance(module, nn.Embedding):
        # Gemma's and BART's multiply what they look up.
        return functional.embedding(x, weight) * getattr(module, "embed_scale", 1.0)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        kind: Any = next(kind for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(module, kind))
        convolved: Tensor = kind._conv_forward(module, x, weight, bias)
        return convolved
    return functional.linear(x, weight.T if is_conv1d(module) else weight, bias)


def _other_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return random values for weight and bias, in at least float32, where rounding hides nothing."""
    options = tensor_options(module)
    size = 1.0 if isinstance(module, nn.Embedding) else features(module)[0] ** -0.5
    parameters = {name: module._parameters.get(name) for name in ("weight", "bias")}
    return {name: size * torch.randn(p.shape, **options) for name, p in parameters.items() if p is not None}


def _inputs(module: nn.Module, weight: Tensor) -> Iterator[Tensor]:
    """Yield inputs of the shapes that such a module takes, and one with the features where a convolution has them."""
    options: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
    if isinstance(module, nn.Embedding):
        yield from (torch.randint(module.num_embeddings, shape, device=weight.device) for shape in ((4,), (2, 3)))
    elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        padding = [0] * len(module.kernel_size) if isinstance(module.padding, str) else module.padding
        spans = zip(module.kernel_size, module.dilation, padding, strict=True)
        least = [dilation * (kernel - 1) + 1 + 2 * pad for kernel, dilation, pad in spans]
        for more in (1, 2):
            yield torch.randn(2, module.in_channels, *(n + more for n in least), **options)
    else:
        d_in = features(module)[0]
        length = 3 if d_in != 3 else 4
        yield from (torch.randn(shape, **options) for shape in ((2, d_in), (2, length, d_in), (2, d_in, length)))


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Have ``module`` run in eval mode without hooks, and leave no trace in it or in the random streams."""
    kept = {part: dict(part.__dict__) for part in module.modules()}
    device = next(module.parameters()).device
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            for part, own in kept.items():
                part.__dict__.update({k: copy.copy(v) for k, v in own.items() if isinstance(v, dict | list | set)})
                part.__dict__.update({name: {} for name in _HOOKS}, training=False)
                part._buffers.update({name: None if b is None else b.clone() for name, b in part._buffers.items()})
            yield
        finally:
            to_the_end(partial(_put_back, kept))


def _put_back(kept: Mapping[nn.Module, dict[str, Any]]) -> None:
    for part, own in kept.items():
        part.__dict__.update(own)
        for name in part.__dict__.keys() - own.keys():
            del part.__dict__[name]
