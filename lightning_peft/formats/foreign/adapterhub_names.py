"""Where AdapterHub's package has its bottleneck and Compacter adapters, and what it calls them: adapters 1.3.0.

It puts one after attention or after the MLP of a layer, where the methods here have the last linear layer of either, or
the layer, for a host. Which is which is known for the models that the tests compare with that package.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.structure.blocks import Block, find_blocks
from lightning_peft.targets.patterns import endings

TENSORS = "adapter.safetensors"
"""The file of an adapter's tensors; an older one is a pickle."""

_BESIDE = {
    "attention_adapters": ("attention", 0),
    "cross_attention_adapters": ("attention", 1),
    "output_adapters": ("mlp", 0),
}
"""Modules of its own in a layer: after which block of the layer, and which of that kind."""
POST_NORM = ("bert", "roberta", "xlm-roberta", "electra")
"""Models in which the sublayer's last linear layer is ``dense`` of a module that the adapters are kept in."""
_IN_LAYER = ("gpt2", "llama", "mistral", "distilbert", "bart")
_SUBLAYERS = ("t5",)
"""Models in which each sublayer is a module."""
MODELS = (*POST_NORM, *_IN_LAYER, *_SUBLAYERS)

_Way = Callable[[Tensor], Tensor]
LINEAR: Mapping[str, tuple[str, _Way, _Way]] = {
    "adapter_down.0.weight": ("down", lambda w: w, lambda w: w),
    "adapter_down.0.bias": ("down_bias", lambda b: b, lambda b: b),
    "adapter_up.weight": ("up", lambda w: w, lambda w: w),
    "adapter_up.bias": ("up_bias", lambda b: b, lambda b: b),
}
"""Its name of a parameter, ours, and the way to our layout and back."""
PHM: Mapping[str, tuple[str, _Way, _Way]] = {
    # Its matrices are those of x W, ours those of W x.
    "adapter_down.0.W_left": ("down_t", lambda w: w[..., 0], lambda w: w[..., None]),
    "adapter_down.0.W_right": ("down_s", lambda w: w[:, 0], lambda w: w[:, None]),
    "adapter_down.0.b": ("down_bias", lambda b: b, lambda b: b),
    "adapter_up.W_left": ("up_t", lambda w: w[..., 0], lambda w: w[..., None]),
    "adapter_up.W_right": ("up_s", lambda w: w[:, 0], lambda w: w[:, None]),
    "adapter_up.b": ("up_bias", lambda b: b, lambda b: b),
}

SLOW = "slow.phm_A"
"""Our name of the matrices that all adapters of a Compacter share."""

ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "swish": "silu",
    "silu": "silu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
} | {"leakyrelu": "leaky_relu"}
DEFAULTS: Mapping[str, Any] = {
    "adapter_residual_before_ln": False,
    **{"cross_adapter": False, "dropout": 0.0, "factorized_phm_W": True, "factorized_phm_rule": False},
    **{"hypercomplex_nonlinearity": "glorot-uniform", "init_weights": "bert", "init_weights_seed": None},
    **{"inv_adapter": None, "inv_adapter_reduction_factor": None, "is_parallel": False, "learn_phm": True},
    **{"leave_out": [], "ln_after": False, "ln_before": False, "original_ln_after": True, "original_ln_before": False},
    **{"phm_bias": True, "phm_c_init": "normal", "phm_dim": 4, "phm_init_range": 0.0001, "phm_layer": False},
    **{"phm_rank": 1, "residual_before_ln": True, "scaling": 1.0, "shared_W_phm": False, "shared_phm_rule": True},
    **{"stochastic_depth": 0.0, "use_gating": False},
}
"""Its configuration of a bottleneck; what has no default here is always said."""


class Places:
    """Finds the blocks of a model by the names that the package gives its modules."""

    def __init__(self, root: ModelView, path: Path) -> None:
        self._root, self._path = root, path
        self._blocks = find_blocks(root)
        refuse_model(root, str(path))

    def block(self, place: str) -> Block:
        """Return the block after which there is what is called ``place`` there."""
        lead = getattr(self._root.module, "base_model_prefix", "")
        for name in (*endings(place), f"{lead}.{place}"):
            layer, _, leaf = name.rpartition(".")
            if leaf in _BESIDE:
                kind, index = _BESIDE[leaf]
                found = [block for block in self._blocks if block.layer == layer and block.kind == kind][
                    index : index + 1
                ]
            else:
                found = [block for block in self._blocks if block.last.startswith(f"{name}.")]
            if len(found) == 1:
                return found[0]
        raise PEFTError(
            f"{self._path} has an adapter in {place!r}, of which this {self._root.kind} has no block. "
            "Name the model that it was trained on."
        )


def refuse_model(root: ModelView, source: str) -> None:
    """Raise :class:`PEFTError` if it is not known where the package has its adapters in such a model."""
    kind = model_type(root)
    if kind not in MODELS:
        raise PEFTError(
            f"{source}: where AdapterHub's package has its adapters in a model of type {kind!r} is not known here; in "
            f"{', '.join(MODELS)} it is."
        )


def place_of(block: Block, blocks: Sequence[Block], root: ModelView) -> str:
    """Return what the package calls the place after ``block``, one of ``blocks`` of the model ``root``."""
    kind = model_type(root)
    if kind in _IN_LAYER:
        leaf = next(
            leaf for leaf, (of, index) in _BESIDE.items() if (of, index) == (block.kind, number_of(block, blocks))
        )
        return f"{block.layer}.{leaf}"
    if kind in _SUBLAYERS and (found := re.match(r"(.+\.layer\.\d+)\.", block.last)):
        return found[1]
    return block.last.rpartition(".")[0]


def number_of(block: Block, blocks: Sequence[Block]) -> int:
    """Return 0 for the first block of its kind in its layer, 1 for cross-attention."""
    return [other.last for other in blocks if (other.layer, other.kind) == (block.layer, block.kind)].index(block.last)


def model_type(root: ModelView) -> str | None:
    """Return what transformers calls the architecture."""
    return getattr(getattr(root.module, "config", None), "model_type", None)
