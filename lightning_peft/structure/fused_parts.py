"""Which rows of a layer that computes query, key and value in one belong to which of them.

The layout cannot be seen in the weights: it is known for the architectures named here.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.structure.attention import role_of
from lightning_peft.tensors.weights import features, is_linear

PART = Literal["q", "k", "v"]

# All queries, then all keys, then all values.
_IN_ORDER = ("gpt2", "phi3")
# One group after another: its queries, its key, its value. A group is a head, or the heads that share a key.
_IN_GROUPS = ("gpt_neox", "bloom", "falcon")


def is_fused(name: str, module: nn.Module) -> bool:
    """Whether the linear layer ``name`` is called as one that computes query, key and value."""
    return is_linear(module) and role_of(name.rpartition(".")[2]) == "qkv"


def part_rows(model: ModelView, name: str) -> dict[str, Tensor]:
    """Return the indices of the outputs of the layer ``name`` that are queries, keys and values.

    Raises:
        PEFTError: Its layout is not known.
    """
    modules = model.modules
    config = _config(modules, name)
    kind = getattr(config, "model_type", None)
    d_in, d_out = features(modules[name])
    heads, shared = _heads(config, kind) if kind in (*_IN_ORDER, *_IN_GROUPS) else (1, 0)
    if kind not in (*_IN_ORDER, *_IN_GROUPS) or d_out % (heads + 2 * shared) or (kind == "gpt2" and d_out != 3 * d_in):
        raise PEFTError(
            f"LoRA: fused_parts was given, but how queries, keys and values lie in the outputs of {name!r} ({d_in} → "
            f"{d_out}, in a model of type {kind!r}) is not known; it is for {', '.join((*_IN_ORDER, *_IN_GROUPS))}. "
            "Exclude the layer, or adapt it whole."
        )
    size = d_out // (heads + 2 * shared)
    rows = torch.arange(d_out, device="cpu")
    if kind in _IN_ORDER:
        return dict(zip("qkv", rows.split([heads * size, shared * size, shared * size]), strict=True))
    groups = rows.view(shared, heads // shared + 2, size)
    return {"q": groups[:, :-2].flatten(), "k": groups[:, -2].flatten(), "v": groups[:, -1].flatten()}


def _heads(config: Any, kind: str | None) -> tuple[int, int]:
    """Return the numbers of heads, and of keys and values."""
    heads: int = config.num_attention_heads
    if kind == "phi3":
        return heads, config.num_key_value_heads or heads
    if kind == "falcon":
        return heads, config.num_kv_heads if config.new_decoder_architecture else 1 if config.multi_query else heads
    return heads, heads


def _config(modules: dict[str, nn.Module], name: str) -> Any:
    """Return the configuration of the smallest module around ``name`` that has one."""
    while name:
        name = name.rpartition(".")[0]
        config = getattr(modules[name], "config", None)
        if hasattr(config, "model_type"):
            return config
    return None
