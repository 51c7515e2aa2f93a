"""Prefix tuning that AdapterHub's package has written, and for it: adapters 1.3.0.

There the text keeps its positions (``keep_positions``), and all prefixes are one tensor, in the layout of ours. An MLP
that gives them is folded away. Which attention it ran with, no file says, and its outputs depend on that.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_peft.adapters.virtual_tokens.virtual_tokens import Decoder, find_decoder
from lightning_peft.core.adapter import CHILD
from lightning_peft.core.schema import check_values
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.formats.foreign.adapterhub_names import ACTIVATIONS, model_type
from lightning_peft.methods.prefix_tuning import PrefixTuning, key_value_heads

ARCHITECTURE = "prefix_tuning"

_MODELS = ("gpt2", "llama", "mistral")
"""Decoders that the package has prefixes in; of encoders there is no prefix tuning here."""
_DEFAULTS: Mapping[str, Any] = {
    **{"architecture": ARCHITECTURE, "encoder_prefix": True, "cross_prefix": True, "leave_out": [], "flat": False},
    **{"prefix_length": 30, "bottleneck_size": 512, "non_linearity": "tanh", "dropout": 0.0, "use_gating": False},
    **{"shared_gating": True, "init_weights_seed": None},
}
"""Its configuration of a prefix."""
_TYPES = {"flat": bool, "prefix_length": int, "non_linearity": str}
_OWN = re.compile(r"(?:.+\.)?prefix_tuning\.(?:pool\.)?prefix_tunings\.[^.]+\.self_prefix\.(.+)")
_FLAT = ("control_trans",)
_MLP = ("wte.weight", *(f"control_trans.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")))


def read_prefix(
    given: Mapping[str, Any], stored: Mapping[str, Tensor], root: ModelView, path: Path
) -> tuple[PrefixTuning, dict[str, Tensor]]:
    """Return the method, and its tensor by the name in the model ``root``.

    Args:
        given: What the package says of the prefix.
        stored: The tensors of its file.
        root: The base; it may have no values.
        path: The directory, for errors.

    Raises:
        PEFTError: It has what is not here, is damaged, or of another model.
    """
    said = {**_DEFAULTS, **given}
    check_values(said, _TYPES, str(path))
    for key in ("use_gating", "leave_out"):
        if said[key] != _DEFAULTS[key]:
            raise PEFTError(
                f"{path} has {key}={said[key]!r}, which prefix tuning here does not have: a prefix is in every layer, "
                "as it is. Its own package reads it."
            )
    decoder = _decoder(root, str(path))
    parts: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        found = _OWN.fullmatch(name)
        if found is None or found[1] not in (_FLAT if said["flat"] else _MLP):
            raise PEFTError(f"{path} holds {name!r}, for which there is no place in a prefix of this package.")
        # Every layer has the file repeat the whole.
        if not torch.equal(parts.setdefault(found[1], tensor), tensor):
            raise PEFTError(f"{path} holds {name!r} with two values. It is damaged.")
    heads, width = key_value_heads(decoder)
    shape = said["prefix_length"], len(decoder.attention) * 2 * heads * width
    try:
        prefixes = (parts["control_trans"] if said["flat"] else _folded(parts, said, path)).reshape(shape)
    except (KeyError, RuntimeError):
        given_shapes = {name: list(tensor.shape) for name, tensor in parts.items()}
        raise PEFTError(
            f"{path} has tensors of the shapes {given_shapes}; {shape[0]} tokens in this {root.kind} make {shape[0]} · "
            f"{shape[1]} values. It is damaged, or of another model."
        ) from None
    warnings.warn(
        f"{path}: AdapterHub's package computes prefixes as its paper and this package do with "
        "attn_implementation='eager' alone. With 'sdpa', which is its default, it passes a prefix over where there is "
        "padding, and elsewhere hides tokens from those behind them. If that is how it was trained, train it anew.",
        stacklevel=2,
    )
    method = PrefixTuning(num_virtual_tokens=said["prefix_length"], keep_positions=True)
    return method, {_name(decoder): prefixes.contiguous()}


def write_prefix(
    method: PrefixTuning, tensors: Mapping[str, Tensor], root: ModelView, name: str, source: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the package's configuration of a prefix, and the tensors of its file, for an adapter called ``name``.

    Raises:
        PEFTError: The package has no place for it in the model ``root``, or ``tensors`` are not a prefix's.
    """
    decoder = _decoder(root, source)
    if set(tensors) != {_name(decoder)}:
        raise PEFTError(f"{source} holds {', '.join(sorted(tensors))}; {_name(decoder)} was expected. It is damaged.")
    flat = tensors[_name(decoder)].flatten()
    ending = f"prefix_tunings.{name}.self_prefix.control_trans"
    places = [f"{decoder.name}.prefix_tuning", *(f"{block}.prefix_tuning.pool" for block in decoder.attention)]
    said = {**_DEFAULTS, "flat": True, "prefix_length": method.num_virtual_tokens}
    return said, {f"{place}.{ending}".lstrip("."): flat.clone() for place in places}


def _decoder(root: ModelView, source: str) -> Decoder:
    if (kind := model_type(root)) not in _MODELS:
        raise PEFTError(
            f"{source}: prefixes of AdapterHub's package are known here in models of type {', '.join(_MODELS)}; this "
            f"one is {kind!r}. Its own package reads them."
        )
    return find_decoder(root, "PrefixTuning")


def _name(decoder: Decoder) -> str:
    return f"{decoder.name}.{CHILD}.prefixes.prompt_embeddings".lstrip(".")


def _folded(parts: Mapping[str, Tensor], said: Mapping[str, Any], path: Path) -> Tensor:
    """Return what the MLP of ``parts`` gives, ``[tokens, layers · 2 · heads · head_dim]``."""
    if (named := said["non_linearity"].lower()) not in ACTIVATIONS:
        raise PEFTError(f"{path} has non_linearity={said['non_linearity']!r}; {', '.join(ACTIVATIONS)} are known.")
    tokens, *rest = (parts[key].double() for key in _MLP)
    hidden = getattr(functional, ACTIVATIONS[named])(functional.linear(tokens, rest[0], rest[1]))
    return functional.linear(hidden, rest[2], rest[3]).to(parts[_MLP[0]].dtype)
