"""What is compared: this package, its peers, full fine-tuning, and the limit. A peer that is missing is named."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from benchmarks.subjects import sharing_weights
from lightning_peft import LoRA, inject

RANK, ALPHA = 8, 16


@dataclass(frozen=True)
class Variant:
    """A way to make a model trainable."""

    name: str
    make: Callable[[Any, float], nn.Module]
    """From a subject and a dropout probability to what is trained."""
    package: str = "lightning_peft"
    own_weights: bool = False
    """Whether it trains the base's weights, which have to be its own then."""
    dropouts: tuple[float, ...] = (0.0, 0.05)

    @property
    def missing(self) -> bool:
        return find_spec(self.package) is None

    def build(self, subject: nn.Module, dropout: float = 0.0) -> nn.Module:
        """Return a copy of ``subject`` made trainable; it shares the weights where they are frozen."""
        model = copy.deepcopy(subject) if self.own_weights else sharing_weights(subject)
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            return self.make(model, dropout)


def _frozen(model: Any, dropout: float) -> nn.Module:
    return model.requires_grad_(False)


def _full(model: Any, dropout: float) -> nn.Module:
    return model.requires_grad_(True)


def ours(model: Any, dropout: float) -> nn.Module:
    inject(model, LoRA(r=RANK, alpha=ALPHA, dropout=dropout, target_modules=list(model.targets)))
    return model


def hf_peft(model: Any, dropout: float) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=list(model.targets))
    # Injected in place, without the wrapper around the model: the layers are what is compared.
    return in_float32(peft.inject_adapter_in_model(config, model))


def in_float32(model: nn.Module) -> nn.Module:
    """Cast adapters of HF peft, as its `get_peft_model` does."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def _loralib(model: Any, dropout: float) -> nn.Module:
    import loralib

    def made(linear: nn.Linear) -> nn.Module:
        bias = linear.bias is not None
        size = (linear.in_features, linear.out_features)
        layer = loralib.Linear(*size, RANK, ALPHA, dropout, merge_weights=False, bias=bias, device="meta")
        layer = layer.to_empty(device=linear.weight.device)
        layer.weight, layer.bias = linear.weight, linear.bias
        return _start(layer, linear.weight.dtype)

    return _with_replaced(model, made)


def _litgpt(model: Any, dropout: float) -> nn.Module:
    from litgpt.lora import LoRALinear

    def made(linear: nn.Linear) -> nn.Module:
        size = (linear.in_features, linear.out_features)
        with torch.device("meta"):
            layer = LoRALinear(*size, RANK, ALPHA, dropout)
        layer = layer.to_empty(device=linear.weight.device)
        layer.linear = linear
        return _start(layer, linear.weight.dtype)

    return _with_replaced(model, made)


def _start(layer: Any, dtype: torch.dtype) -> nn.Module:
    nn.init.kaiming_uniform_(layer.lora_A)
    nn.init.zeros_(layer.lora_B)
    for parameter in (layer.lora_A, layer.lora_B):
        # These do not compute in two dtypes.
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_()
    return layer


def _with_replaced(model: Any, made: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and any(name.endswith(target) for target in model.targets):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, made(module))
    return model


BOUND, OURS, PEFT, FULL = "frozen bound", "lightning_peft", "HF peft", "full fine-tuning"

VARIANTS = (
    Variant(BOUND, _frozen, dropouts=(0.0,)),
    Variant(OURS, ours),
    Variant(PEFT, hf_peft, "peft"),
    Variant("loralib", _loralib, "loralib"),
    Variant("LitGPT", _litgpt, "litgpt"),
    Variant(FULL, _full, own_weights=True, dropouts=(0.0,)),
)

ADAPTERHUB = "`adapters` (AdapterHub) is skipped: it needs another version of transformers than this package."


def present(*names: str) -> list[Variant]:
    """Return the variants ``names``, all if none is given, whose package is there."""
    return [v for v in VARIANTS if not v.missing and (not names or v.name in names)]


def notes(device: str = "cpu") -> list[str]:
    """Say which variants are missing, and what is not alike."""
    narrow = "The base is in bfloat16; adapters are in float32, as users have them, but those of loralib and LitGPT."
    missing = [f"{v.name} is skipped: `{v.package}` is not installed." for v in VARIANTS if v.missing]
    return ([] if device == "cpu" else [narrow]) + missing + [ADAPTERHUB]
