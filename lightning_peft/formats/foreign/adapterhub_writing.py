"""Bottleneck and Compacter adapters as AdapterHub's package loads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_peft.core.adapter import CHILD
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError, listed
from lightning_peft.formats import own
from lightning_peft.formats.foreign.adapterhub_names import (
    ACTIVATIONS,
    DEFAULTS,
    LINEAR,
    PHM,
    POST_NORM,
    SLOW,
    model_type,
    number_of,
    place_of,
    refuse_model,
)
from lightning_peft.formats.foreign.adapterhub_prefix import write_prefix
from lightning_peft.methods.compacter import Compacter
from lightning_peft.methods.parallel_adapter import ParallelAdapter
from lightning_peft.methods.prefix_tuning import PrefixTuning
from lightning_peft.methods.series_adapter import SeriesAdapter
from lightning_peft.structure.blocks import Block, find_blocks

_Method = SeriesAdapter | ParallelAdapter | Compacter | PrefixTuning
_NAME = "default"
"""What the adapter is called there, until it is loaded as another."""


def files_for_adapterhub(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], root: ModelView, source: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return ``adapter_config.json`` and the tensors of ``adapter.safetensors``.

    Args:
        config: Of an adapter in this package's own format.
        tensors: Its tensors.
        root: The base; it may have no values.
        source: What to call the adapter in errors.

    Raises:
        PEFTError: The package has no such adapters, or no place for them in this model.
    """
    refuse_model(root, source)
    method = _method_of(config, tensors, root, source)
    if isinstance(method, PrefixTuning):
        said, prefix = write_prefix(method, tensors, root, _NAME, source)
        model: Any = root.module
        return {"config": said, **_about(root, model.config.hidden_size)}, prefix
    compact, parallel = isinstance(method, Compacter), isinstance(method, ParallelAdapter)
    behind_norm = not parallel and method.placement == ["residual"]
    blocks = find_blocks(root)
    hosts = {
        block.layer if behind_norm else block.last: block for block in blocks if not behind_norm or block.kind == "mlp"
    }
    inner = {ours: (theirs, back) for theirs, (ours, _, back) in (PHM if compact else LINEAR).items()}
    found: dict[str, Tensor] = {}
    adapted: dict[str, Block] = {}
    for key, tensor in tensors.items():
        host, _, part = key.partition(f".{CHILD}.")
        if part == SLOW:
            found[f"{_lead(root)}shared_parameters.{_NAME}.phm_rule"] = tensor.mT.contiguous()
            continue
        if host not in hosts or part not in inner:
            raise PEFTError(
                f"{source} has {key!r}: AdapterHub's package has adapters behind attention and MLP of this {root.kind} "
                "alone."
            )
        adapted[host] = block = hosts[host]
        theirs, back = inner[part]
        found[f"{place_of(block, blocks, root)}.adapters.{_NAME}.{theirs}"] = back(tensor).contiguous()
    if not method.bias:
        like = next(iter(found.values()))
        for block in adapted.values():
            place = f"{place_of(block, blocks, root)}.adapters.{_NAME}"
            found |= _zero_biases(place, "b" if compact else "bias", like, method.bottleneck, block.width)
    crossing = [block for block in adapted.values() if block.kind == "attention" and number_of(block, blocks)]
    layers = list(dict.fromkeys(block.layer for block in blocks))
    said = {
        **DEFAULTS,
        "mh_adapter": any(block.kind == "attention" for block in adapted.values()),
        "output_adapter": any(block.kind == "mlp" for block in adapted.values()),
        "cross_adapter": bool(crossing),
        "original_ln_before": behind_norm,
        "is_parallel": parallel,
        "phm_layer": compact,
        "phm_dim": method.n if isinstance(method, Compacter) else DEFAULTS["phm_dim"],
        "scaling": float(method.scale),
        "dropout": method.dropout,
        "non_linearity": _activation(str(method.activation), source),
        "reduction_factor": _factor(blocks[0].width, method.bottleneck),
        "leave_out": [i for i, layer in enumerate(layers) if layer not in {b.layer for b in adapted.values()}],
    }
    return {"config": said, **_about(root, blocks[0].width)}, found


def _about(root: ModelView, width: int) -> dict[str, Any]:
    about = {"hidden_size": width, "model_class": root.kind, "model_name": "", "model_type": model_type(root)}
    return {**about, "name": _NAME, "version": "adapters.1.3.0"}


def _lead(root: ModelView) -> str:
    """Return the beginning of the names of the model within a head, if it is one."""
    prefix = getattr(root.module, "base_model_prefix", "")
    return f"{prefix}." if prefix in root.modules else ""


def refuse_other_types(config: Mapping[str, Any], source: str) -> None:
    """Raise :class:`PEFTError` for an adapter that is in HF PEFT's format."""
    if config.get("peft_type") != own.PEFT_TYPE:
        raise PEFTError(
            f"{source} is of HF PEFT's type {config.get('peft_type')!r}; for AdapterHub's package SeriesAdapter, "
            "ParallelAdapter, Compacter and PrefixTuning(keep_positions=True) are written. HF PEFT reads it, and so do "
            "servers."
        )


def _method_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor], root: ModelView, source: str) -> _Method:
    content = own.read_content(config, tensors, source)
    method = content.methods[0]
    if len(content.methods) > 1 or content.train_also or not isinstance(method, _Method):
        beside = f" with {listed(content.train_also)} trained whole" if content.train_also else ""
        raise PEFTError(
            f"{source} is {' and '.join(type(m).__name__ for m in content.methods)}{beside}; for AdapterHub's package "
            "one SeriesAdapter, ParallelAdapter, Compacter or PrefixTuning is written."
        )
    if isinstance(method, PrefixTuning):
        return method
    if not isinstance(method, ParallelAdapter) and method.train_norms:
        raise PEFTError(
            f"{source} trains LayerNorms, for which AdapterHub's files have no place. Train with train_norms=False."
        )
    if isinstance(method, ParallelAdapter) and (model_type(root) not in POST_NORM or method.target_modules is not None):
        raise PEFTError(
            f"{source}: parallel adapters of AdapterHub's package read the hidden state before a norm. By placement "
            f"they are as here in {', '.join(POST_NORM)} alone."
        )
    return method


def _zero_biases(place: str, leaf: str, like: Tensor, bottleneck: int, width: int) -> dict[str, Tensor]:
    """Return biases of zero, since in the package there always are biases."""
    return {
        f"{place}.adapter_down.0.{leaf}": like.new_zeros(bottleneck),
        f"{place}.adapter_up.{leaf}": like.new_zeros(width),
    }


def _activation(name: str, source: str) -> str:
    named = {ours: theirs for theirs, ours in ACTIVATIONS.items()} | {"swish": "swish"}
    if name not in named:
        raise PEFTError(f"{source} has activation={name!r}, which AdapterHub's package does not have.")
    return named[name]


def _factor(width: int, bottleneck: int) -> float:
    """Return what the width is divided by to get the bottleneck's, without a remainder."""
    return width / bottleneck if width % bottleneck == 0 else width / (bottleneck + 0.5)
