"""Weights that a quantiser has packed, or will pack when their module moves: the one place that tells.

Quantisers keep codes in the parameter ``weight`` (bitsandbytes, torchao, quanto, FP8), or in a tensor of another name
in its stead (GPTQ, AWQ, HQQ, compressed-tensors). Lightning's ``BitsandbytesPrecision`` makes layers whose weight is
still a float one when adapters are injected: it is packed when it gets to its device. There its class tells.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

# GPTQ and AWQ, HQQ, compressed-tensors.
_ELSEWHERE = ("qweight", "W_q", "weight_packed")
_ROWS = 4096
"""How many rows of the identity a layer is given at a time."""


def is_packed(module: nn.Module) -> bool:
    """Whether the weight :func:`holds_codes`, or will when the module moves."""
    weight = _own(module, "weight")
    if weight is None:
        return any(_own(module, name) is not None for name in _ELSEWHERE)
    return holds_codes(weight) or _will_hold_codes(weight)


def is_packed_linear(module: nn.Module) -> bool:
    """Whether that is a linear layer, of whatever class its quantiser makes."""
    return isinstance(getattr(module, "in_features", None), int) and is_packed(module)


def holds_codes(tensor: Tensor) -> bool:
    """Whether ``tensor`` holds codes of a quantiser, from which its values have to be worked out first.

    Such are integers, floating-point numbers of fewer than 16 bits, and tensor classes of a quantiser's own.
    """
    if isinstance(tensor, DTensor):
        return False
    codes = not tensor.is_floating_point() or tensor.dtype.itemsize < 2
    return codes or hasattr(tensor, "__tensor_flatten__")


def is_rounded(module: nn.Module) -> bool:
    """Whether the float weight is what a quantiser's codes were, which is another by more than two dtypes differ.

    compressed-tensors makes such weights of its codes when a model first runs, and leaves its mark.
    """
    return hasattr(module, "quantization_scheme")


@torch.no_grad()
def unpack(module: nn.Module, dtype: torch.dtype) -> None:
    """Make a packed linear layer an ``nn.Linear`` in place, whose weight is what it computes with, in ``dtype``.

    What hangs on it stays, but for what its quantiser does when states are made or loaded. The weight is what the layer
    makes of the identity, so that no quantiser's functions need be known.
    """
    weight = _matrix(module, dtype)
    bias = getattr(module, "bias", None)
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        plain.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias.to(dtype), requires_grad=False)
    hooks = {name: value for name, value in vars(module).items() if "_forward" in name or "_backward" in name}
    kept = {name: vars(module)[name] for name in ("training", "_modules")}
    module.__class__ = nn.Linear
    module.__dict__ = {**vars(plain), **hooks, **kept}


def forget_quantiser(model: nn.Module) -> None:
    """Have a transformers model, and what is saved of it, no longer say that it is quantised."""
    for holder, name in ((model, "hf_quantizer"), (getattr(model, "config", None), "quantization_config")):
        if hasattr(holder, name):
            delattr(holder, name)
    for name in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method"):
        model.__dict__.pop(name, None)


def _matrix(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """Return the weight ``[out, in]`` with which ``module`` computes."""
    if (weight := _own(module, "weight")) is not None and not holds_codes(weight):
        return weight.detach().to(dtype)
    d_in = int(module.in_features)  # type: ignore[arg-type]
    bias, module.bias = getattr(module, "bias", None), None  # type: ignore[assignment]
    device = next(tensor.device for tensor in (*module.parameters(), *module.buffers()))
    try:
        # bitsandbytes packs anew for CPUs where no gradient is asked for.
        unit = [rows.requires_grad_() for rows in torch.eye(d_in, dtype=dtype, device=device).split(_ROWS)]
        return torch.cat([module.forward(rows) for rows in unit]).T.contiguous()
    finally:
        module.bias = bias  # type: ignore[assignment]


def _will_hold_codes(weight: Tensor) -> bool:
    """Whether ``weight`` is one that bitsandbytes packs, unless it only computes with codes of it."""
    packs = any(kind.__module__.partition(".")[0] == "bitsandbytes" for kind in type(weight).__mro__)
    return packs and not getattr(weight, "has_fp16_weights", False)


def _own(module: nn.Module, name: str) -> Tensor | None:
    # What TorchScript has in place of the dictionaries knows no ``get``.
    return {**dict(module._buffers.items()), **dict(module._parameters.items())}.get(name)
