"""Bottleneck, Compacter and prefix adapters that AdapterHub's package has written.

Its placements are not all there are here: what has another one, or a part of which there is none, is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_peft.core.adapter import CHILD
from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.schema import check_values
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError, listed
from lightning_peft.files.contents import read_json, read_tensors, read_torch
from lightning_peft.formats import own
from lightning_peft.formats.configuration import named_base
from lightning_peft.formats.foreign.adapterhub_names import (
    ACTIVATIONS,
    DEFAULTS,
    LINEAR,
    PHM,
    POST_NORM,
    SLOW,
    TENSORS,
    Places,
    model_type,
)
from lightning_peft.formats.foreign.adapterhub_prefix import ARCHITECTURE, read_prefix
from lightning_peft.methods.compacter import Compacter
from lightning_peft.methods.parallel_adapter import ParallelAdapter
from lightning_peft.methods.series_adapter import SeriesAdapter
from lightning_peft.structure.blocks import Block, find_blocks

_CONFIG = "adapter_config.json"
_PICKLED = "pytorch_adapter.bin"
_HEAD, _PICKLED_HEAD = "model_head.safetensors", "pytorch_model_head.bin"
_OWN = re.compile(r"(.+)\.(?:adapters|(?:attention|layer)_text_(?:task|lang)_adapters)\.([^.]+)\.(.+)")
_SHARED = re.compile(r"(?:.+\.)?shared_parameters\.([^.]+)\.phm_rule")

_FIXED = (
    *("factorized_phm_W", "factorized_phm_rule", "inv_adapter", "ln_after", "ln_before", "original_ln_after"),
    *("phm_bias", "phm_rank", "residual_before_ln", "shared_W_phm", "shared_phm_rule", "use_gating"),
)
"""Keys of which there is one value here: that of the defaults."""
_TYPES = {"phm_dim": int, "scaling": float, "dropout": float, "non_linearity": str, "is_parallel": bool} | {
    **{"phm_layer": bool, "mh_adapter": bool, "output_adapter": bool, "original_ln_before": bool}
}


@dataclass(frozen=True)
class ForeignBottleneck:
    """An adapter in the terms of this package's own files; names are those of the model that it is given."""

    method: PEFTMethod
    tensors: Mapping[str, Tensor]
    whole: tuple[str, ...]
    """Modules trained whole: a head."""

    def as_files(self, root: ModelView, source: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the configuration and the tensors of a directory in this package's own format."""
        config = {"methods": [self.method.config()], "train_also": list(self.whole)}
        return {"peft_type": own.PEFT_TYPE, **named_base(root), **config}, dict(self.tensors)


def read_adapterhub(path: Path, root: ModelView) -> ForeignBottleneck:
    """Read what ``model.save_adapter`` of AdapterHub's package has written; ``.bin`` files as data alone.

    Raises:
        PEFTError: It is no bottleneck, Compacter or prefix that is here as well, damaged, or of another model.
    """
    config = read_json(path / _CONFIG)
    given = config.get("config")
    if isinstance(given, dict) and given.get("architecture") == ARCHITECTURE:
        prefix, values = read_prefix(given, _stored(path), root, path)
        head = _head(path, root)
        return ForeignBottleneck(prefix, {**values, **head}, tuple(sorted({n.rpartition(".")[0] for n in head})))
    said, stored = _settings(config, path), _stored(path)
    layouts = PHM if said["phm_layer"] else LINEAR
    at_layer = bool(said["original_ln_before"])
    places = Places(root, path)
    tensors: dict[str, Tensor] = {}
    blocks: dict[str, Block] = {}
    slow: Tensor | None = None
    for name, tensor in stored.items():
        if _SHARED.fullmatch(name):
            slow = tensor.mT.contiguous()
            continue
        found = _OWN.fullmatch(name)
        if found is None or found[3] not in layouts:
            raise PEFTError(f"{path} holds {name!r}, for which there is no place in a bottleneck of this package.")
        block = places.block(found[1])
        if at_layer and (said["phm_layer"] or block.kind != "mlp"):
            what = "a Compacter" if said["phm_layer"] else f"one in {found[1]!r}, after attention"
            raise PEFTError(f"{path} has adapters behind a norm (original_ln_before), and {what}: there is none here.")
        host = block.layer if at_layer else block.last
        key, way, _ = layouts[found[3]]
        blocks[host] = block
        tensors[f"{host}.{CHILD}.{key}"] = way(tensor)
    if not blocks:
        raise PEFTError(f"{path} holds no adapter. It is damaged.")
    if layouts is PHM:
        if slow is None:
            raise PEFTError(
                f"{path} lacks the matrices that all its layers share (shared_parameters….phm_rule). adapters 1.3.0 "
                "does not save them for T5: what was trained is lost, unless the model is still at hand there."
            )
        tensors[f"{min(blocks, key=list(root.modules).index)}.{CHILD}.{SLOW}"] = slow
    method = _method(said, blocks, tensors, root, path)
    head = _head(path, root)
    return ForeignBottleneck(method, {**tensors, **head}, tuple(sorted({n.rpartition(".")[0] for n in head})))


def _stored(path: Path) -> dict[str, Tensor]:
    return read_tensors(path / TENSORS) if (path / TENSORS).is_file() else read_torch(path / _PICKLED)


def _settings(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the configuration of the bottleneck, with what is not said.

    Raises:
        PEFTError: It is another architecture, or has what is not here.
    """
    given = config.get("config")
    if not isinstance(given, dict):
        raise PEFTError(f"{path / _CONFIG} has config={given!r}; an object was expected. It is damaged.")
    if (kind := given.get("architecture")) is not None:
        raise PEFTError(f"{path} is of AdapterHub's architecture {kind!r}; {_ELSEWHERE.get(str(kind), _NO_OTHER)}")
    said = {**DEFAULTS, **given}
    if isinstance(said["scaling"], int) and not isinstance(said["scaling"], bool):
        said["scaling"] = float(said["scaling"])
    if said["original_ln_before"] and said["is_parallel"]:
        said["original_ln_before"] = False  # not looked at there
    if odd := [key for key in _FIXED if said[key] != DEFAULTS[key]]:
        raise PEFTError(
            f"{path} has {odd[0]}={said[odd[0]]!r}, which no method here has, but {DEFAULTS[odd[0]]!r}. Its own "
            "package reads it."
        )
    if isinstance(said["scaling"], str):
        raise PEFTError(f"{path} has scaling={said['scaling']!r}, a scale that is trained; here it is a number.")
    check_values(said, _TYPES, str(path / _CONFIG))
    # Before it said its version, "gelu" was what transformers calls "gelu_new".
    named = said.get("non_linearity")
    if named not in ACTIVATIONS or (named == "gelu" and "version" not in config):
        raise PEFTError(f"{path} has non_linearity={named!r}; {', '.join(ACTIVATIONS)} of today's package are known.")
    return said


_NO_OTHER = "bottleneck, Compacter and prefix adapters are read. Its own package reads it."
_ELSEWHERE = {
    "lora": "call model.merge_adapter(NAME) there and save the model; `lightning-peft convert MODEL --model BASE --out "
    "lora --energy 0.99` makes a LoRA of the difference.",
}


def _method(
    said: Mapping[str, Any], blocks: Mapping[str, Block], tensors: Mapping[str, Tensor], root: ModelView, path: Path
) -> PEFTMethod:
    """Return the method that has just these adapters."""
    biases = {host: tensors.get(f"{host}.{CHILD}.down_bias") for host in blocks}
    if lost := [host for host, bias in biases.items() if bias is None]:
        raise PEFTError(f"{path} lacks a part of the adapter of {lost[0]!r}. It is damaged.")
    widths = sorted({len(bias) for bias in biases.values() if bias is not None})
    if len(widths) > 1:
        raise PEFTError(f"{path} has bottlenecks of the widths {widths}; here all have one. Its own package reads it.")
    common: dict[str, Any] = {"bottleneck": widths[0], "activation": ACTIVATIONS[said["non_linearity"]], "bias": True}
    common |= {"scale": said["scaling"], "dropout": said["dropout"]}
    kinds = sorted({block.kind for block in blocks.values()})
    if said["original_ln_before"]:
        layers = _layers(blocks.values(), root, ["mlp"])
        return SeriesAdapter(**common, preset="pfeiffer", init="truncated", train_norms=False, layers=layers)
    if said["is_parallel"]:
        if said["phm_layer"] or model_type(root) not in POST_NORM:
            raise PEFTError(
                f"{path} has parallel adapters, which read the hidden state before a norm there, here what the block "
                f"does. That is the same in {', '.join(POST_NORM)} alone."
            )
        return ParallelAdapter(**common, placement=kinds, layers=_layers(blocks.values(), root, kinds))
    every = [block.last for block in find_blocks(root) if block.kind in kinds]
    where: dict[str, Any] = {"placement": kinds} if set(every) == set(blocks) else {"target_modules": list(blocks)}
    if said["phm_layer"]:
        return Compacter(**common, **where, n=said["phm_dim"], train_norms=False)
    return SeriesAdapter(**common, **where, init="truncated", train_norms=False)


def _layers(blocks: Iterable[Block], root: ModelView, kinds: Iterable[Any]) -> list[int] | None:
    """Return the numbers of the layers of ``blocks``, if they are not all."""
    own = {block.layer for block in blocks}
    if own == {block.layer for block in find_blocks(root, kinds)}:
        return None
    return sorted({int(number) for layer in own if (number := layer.rpartition(".")[2]).isdigit()})


def _head(path: Path, root: ModelView) -> dict[str, Tensor]:
    """Return what of the head beside an adapter is not as in the base."""
    if not (path / _HEAD).is_file() and not (path / _PICKLED_HEAD).is_file():
        return {}
    stored = read_tensors(path / _HEAD) if (path / _HEAD).is_file() else read_torch(path / _PICKLED_HEAD)
    own_tensors = root.tensors
    if unknown := [name for name in stored if name not in own_tensors]:
        raise PEFTError(
            f"{path} has a head with {listed(unknown)}, which this {root.kind} does not have: heads are read where the "
            "model's class is the same. Save it there without: model.save_adapter(DIR, NAME, with_head=False)."
        )
    return {n: t for n, t in stored.items() if t.shape != own_tensors[n].shape or not torch.equal(t, own_tensors[n])}
