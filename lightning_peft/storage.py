"""Adapters in directories: which part of a model goes into which directory, saving and loading."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapter import CHILD, unwrap
from lightning_peft.errors import PEFTError
from lightning_peft.fingerprint import describe_base, refuse_other_base
from lightning_peft.formats import hf
from lightning_peft.formats.files import (
    MARKER,
    atomic_directory,
    read_json,
    read_shapes,
    read_tensors,
    restore_interrupted,
    write_json,
    write_tensors,
)
from lightning_peft.inject import inject, refuse_merged
from lightning_peft.methods.lora import LoRA
from lightning_peft.registry import Registry, registries, required
from lightning_peft.select import transformers_models
from lightning_peft.sharding import write
from lightning_peft.state import adapter_parameters_and_whole, adapter_state_dict, check_tensors

_BESIDE_FILE = "trained_whole.safetensors"


@dataclass
class _Part:
    """What one adapter has in one model: the content of one directory in HF PEFT's format."""

    prefix: str
    """Name of that model in the whole."""
    adapter: str
    method: LoRA
    pairs: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Rank and alpha by name of the host, relative to ``prefix``."""
    train_also: list[str] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)


def save_adapter(model: nn.Module, path: str | os.PathLike[str], *, name: str | None = None) -> None:
    """Write an adapter as a directory in HF PEFT's format: ``PeftModel.from_pretrained(base, path)`` reads it.

    A LightningModule that holds one model gives that model's adapter; one that holds several gives a subdirectory
    for each.

    Args:
        model: A model with adapters, merged or not.
        path: The directory to write; one that this function wrote before is replaced, atomically.
        name: Which adapter; the active one if not given.

    Raises:
        PEFTError: There is no such adapter, or ``path`` cannot be written or is not ours to replace.
    """
    found = required(model)
    name = name or found[0][2].active
    if not any(name in registry.methods for _, _, registry in found):
        known = sorted({adapter for _, _, registry in found for adapter in registry.methods})
        raise PEFTError(f"There is no adapter {name!r}. Adapters: {', '.join(known)}.")
    with atomic_directory(path) as directory:
        write_adapters(directory, model, adapter_state_dict(model), names=[name])


def write_adapters(
    directory: Path, model: nn.Module, state: Mapping[str, Tensor], names: Iterable[str] | None = None
) -> dict[str, list[str]]:
    """Write the adapters ``names`` (all, if not given) into an existing directory.

    Modules trained whole that belong to no adapted model, such as a head beside it, go into a file of their own: HF
    PEFT has no place for them.

    Returns:
        For every tensor of ``state`` written, by name: ``[file, name in the file]``.
    """
    model = unwrap(model)
    places: dict[str, list[str]] = {}
    parts, beside = _parts(model, names)
    several = len({part.prefix for part in parts}) > 1
    adapters = [part.adapter for part in parts]
    primary = "default" if "default" in adapters else adapters[0]
    for part in parts:
        # HF PEFT puts every adapter but "default" into a subdirectory of its name.
        segments = [part.prefix if several else "", "" if part.adapter == primary else part.adapter]
        subdirectory = "/".join(segment for segment in segments if segment)
        for in_file, in_model in _write_part(directory / subdirectory, model, part, state).items():
            places[in_model] = [f"{subdirectory}/{hf.TENSOR_FILE}".lstrip("/"), in_file]
    if beside:
        write_tensors(directory / _BESIDE_FILE, {name: state[name] for name in beside})
        places.update({name: [_BESIDE_FILE, name] for name in beside})
    if several:
        write_json(directory / MARKER, {"version": 1, "parts": sorted({part.prefix for part in parts})})
    return places


def read_adapters(directory: Path, places: Mapping[str, list[str]]) -> dict[str, Tensor]:
    """Read back what :func:`write_adapters` wrote, given what it returned.

    Raises:
        PEFTError: A file is missing or damaged, or lacks a tensor.
    """
    files = {}
    for file in {place[0] for place in places.values()}:
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise PEFTError(f"{directory} names the file {file!r}, which lies outside of it. It is not read.")
        files[file] = read_tensors(directory / file)
    try:
        return {name: files[file][in_file] for name, (file, in_file) in places.items()}
    except KeyError as error:
        raise PEFTError(f"{directory} lacks the tensor {error}: it is damaged. Take another checkpoint.") from error


def load_adapter(model: nn.Module, path: str | os.PathLike[str], *, name: str = "default") -> None:
    """Load an adapter directory, written by this package or by HF PEFT, into ``model``.

    The adapter is injected if the model has none of this name; otherwise its tensors are replaced.

    Args:
        model: The base model, or a LightningModule that holds it.
        path: The directory.
        name: The adapter's name in ``model``.

    Raises:
        PEFTError: The directory is missing, damaged, holds NaN, or belongs to another base or method. The model is as
            it was before.
    """
    model = unwrap(model)
    refuse_merged(model, "load an adapter")
    directory = Path(path)
    restore_interrupted(directory)
    marker = read_json(directory / MARKER) if (directory / MARKER).is_file() else {}
    if "parts" in marker:
        places = {str(prefix): directory / str(prefix) for prefix in marker["parts"]}
        if unknown := sorted(places.keys() - dict(model.named_modules()).keys()):
            raise PEFTError(f"{directory} holds an adapter for {unknown[0]!r}; the model has no such part.")
    else:
        places = {_root_of(model, marker): directory}
    loads = [_Load.prepare(model, prefix, place, name) for prefix, place in places.items()]
    beside = _read_beside(model, directory)
    for load in loads:
        load.run()
    with torch.no_grad():
        for parameter, tensor in beside.items():
            model.get_parameter(parameter).copy_(tensor)


@dataclass
class _Load:
    """One adapter directory, read and checked against the part of the model that it is for."""

    model: nn.Module
    prefix: str
    content: hf.Content
    tensors: dict[str, Tensor]
    """By name in the model as a whole."""
    name: str
    existing: bool

    @classmethod
    def prepare(cls, model: nn.Module, prefix: str, directory: Path, name: str) -> _Load:
        root = model.get_submodule(prefix)
        config, file = read_json(directory / hf.CONFIG_FILE), directory / hf.TENSOR_FILE
        shapes, source = read_shapes(file), str(directory)
        content = hf.read_content(root, config, shapes, name, source)
        if (directory / MARKER).is_file():
            base = read_json(directory / MARKER).get("base")
            refuse_other_base(root, base if isinstance(base, dict) else {}, source)
        lead = f"{prefix}." if prefix else ""
        stored = read_tensors(file)
        _refuse_changed_base(root, {name: stored.pop(key) for key, name in content.copies.items()}, source)
        tensors = {f"{lead}{content.names[key]}": tensor for key, tensor in stored.items()}
        present = {key: p for key, p in adapter_parameters_and_whole(model).items() if f".{CHILD}.{name}." in key}
        existing = any(key.startswith(lead) for key in present)
        if existing:
            whole = {key: p for key, p in adapter_parameters_and_whole(model).items() if f".{CHILD}." not in key}
            expected = {key: p.shape for key, p in {**present, **whole}.items() if key.startswith(lead)}
        else:
            expected = {key: tensor.shape for key, tensor in tensors.items()}
        check_tensors(expected, tensors, source)
        return cls(model, prefix, content, tensors, name, existing)

    def run(self) -> None:
        if not self.existing:
            root = self.model.get_submodule(self.prefix)
            inject(root, self.content.method, name=self.name, train_also=self.content.train_also)
        parameters = adapter_parameters_and_whole(self.model)
        with torch.no_grad():
            for key, tensor in self.tensors.items():
                write(parameters[key], tensor)


def _read_beside(model: nn.Module, directory: Path) -> dict[str, Tensor]:
    """Read the modules trained whole that belong to no adapted model."""
    file = directory / _BESIDE_FILE
    if not is_lightning_module(model) or not file.is_file():
        return {}
    tensors, parameters = read_tensors(file), dict(model.named_parameters())
    check_tensors({name: parameters[name].shape for name in tensors if name in parameters}, tensors, str(file))
    return tensors


def _refuse_changed_base(root: nn.Module, copies: Mapping[str, Tensor], source: str) -> None:
    for name, tensor in copies.items():
        present = root.get_parameter(name)
        if present.shape != tensor.shape or not torch.allclose(present.cpu(), tensor.to(present.dtype), atol=1e-6):
            raise PEFTError(
                f"{source} brings its own {name} {list(tensor.shape)}, which is not the model's "
                f"{list(present.shape)}: it was trained with other embeddings (new tokens?). Resize the model's "
                "embeddings and load those weights into it first."
            )


def is_lightning_module(model: nn.Module) -> bool:
    """Whether ``model`` is a LightningModule; known by what it offers, since nothing here imports lightning."""
    return hasattr(model, "configure_optimizers") and hasattr(model, "training_step")


def _root_of(model: nn.Module, marker: Mapping[str, Any]) -> str:
    """Return the name of the part of ``model`` that an adapter directory is about."""
    if not is_lightning_module(model):
        return ""
    inner = list(transformers_models(model))
    if len(inner) == 1:
        return inner[0]
    recorded = marker.get("prefix")
    if isinstance(recorded, str) and recorded in dict(model.named_modules()):
        return recorded
    raise PEFTError(
        f"{type(model).__name__} holds {len(inner)} transformers models, so it is not clear which one the adapter is "
        "for. Pass that model: load_adapter(module.model, path)."
    )


def _parts(model: nn.Module, names: Iterable[str] | None) -> tuple[list[_Part], list[str]]:
    """Return the content of each directory, and the parameters trained whole that have a place in none."""
    parts: dict[tuple[str, str], _Part] = {}
    inner = list(transformers_models(model))
    hosts = {
        f"{lead}.{host}" if lead else host for lead, _, r in registries(model) for h in r.hosts.values() for host in h
    }
    # A layer that is itself an attribute of the LightningModule cannot be the model that it is a layer of.
    split = is_lightning_module(model) and all("." in host for host in hosts)

    def part_of(full_name: str, adapter: str, method: LoRA) -> _Part:
        prefix = next((p for p in inner if p and full_name.startswith(f"{p}.")), None)
        if prefix is None:
            prefix = full_name.split(".")[0] if split else ""
        return parts.setdefault((prefix, adapter), _Part(prefix, adapter, method))

    for registry_prefix, _, registry in registries(model):
        lead = f"{registry_prefix}." if registry_prefix else ""
        for adapter in registry.methods if names is None else [n for n in names if n in registry.methods]:
            _fill_parts(part_of, lead, registry, adapter)
    beside = [part for part in parts.values() if not part.pairs]
    return (
        [part for part in parts.values() if part.pairs],
        [f"{part.prefix}.{_relative(name, part.prefix)}".lstrip(".") for part in beside for name in part.whole],
    )


def _fill_parts(part_of: Any, lead: str, registry: Registry, adapter: str) -> None:
    method = registry.methods[adapter]
    assert isinstance(method, LoRA)
    for host in registry.hosts[adapter]:
        part = part_of(lead + host, adapter, method)
        part.pairs[_relative(lead + host, part.prefix)] = method.rank_and_alpha(host)
    for what, attribute in ((registry.train_also, "train_also"), (registry.whole, "whole")):
        for name in what:
            part = part_of(lead + name, adapter, method)
            getattr(part, attribute).append(_relative(lead + name, part.prefix))


def _relative(name: str, prefix: str) -> str:
    return name.removeprefix(f"{prefix}.") if prefix else name


def _write_part(directory: Path, model: nn.Module, part: _Part, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Write one directory and return the tensors' names in the model by their names in the file."""
    root = model.get_submodule(part.prefix)
    lead = f"{part.prefix}." if part.prefix else ""
    names = {
        in_file: lead + in_root
        for in_file, in_root in hf.tensor_names(root, part.adapter, part.pairs, part.whole).items()
    }
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / hf.TENSOR_FILE, {in_file: state[in_model] for in_file, in_model in names.items()})
    write_json(directory / hf.CONFIG_FILE, hf.config_of(root, part.method, part.pairs, part.train_also))
    write_json(directory / MARKER, {"version": 1, "prefix": part.prefix, "base": describe_base(model, part.prefix)})
    return names
