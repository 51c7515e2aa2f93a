"""Reading adapters from directories."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_peft.core.adapter import CHILD
from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.refusals import refuse_merged
from lightning_peft.core.registry import adapted, note_moved, own_registry, registries
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError, listed
from lightning_peft.files.contents import as_path, inside, read_tensors
from lightning_peft.files.leftovers import restore_interrupted
from lightning_peft.files.manifest import check_manifest
from lightning_peft.files.others import refuse_other_tools
from lightning_peft.formats import hf, own
from lightning_peft.formats.configuration import read_config, read_marker
from lightning_peft.formats.content import TENSOR_FILE, with_adapter, without_adapter
from lightning_peft.formats.counterpart import UNSAID
from lightning_peft.formats.experts import with_experts_joined
from lightning_peft.formats.pieces import take, whole_of
from lightning_peft.operations.inject import inject_prepared, prepare_injection
from lightning_peft.operations.prepare import Prepared, prepared_tensors
from lightning_peft.operations.shards import resharded
from lightning_peft.storage.fingerprint import refuse_other_base
from lightning_peft.storage.saving import BESIDE_FILE, FILES, adapters_of, converted
from lightning_peft.storage.state import (
    adapter_parameters_and_whole,
    check_tensors,
    refuse_other_methods,
)
from lightning_peft.structure.inner_models import is_lightning_module, transformers_models
from lightning_peft.targets.patterns import patterns_of_a_file
from lightning_peft.tensors.allowance import Allowance
from lightning_peft.tensors.seeding import parameters_left_empty
from lightning_peft.tensors.sharding import assign, replace, whole

_MORE = 2**24
"""So many elements of adapters may be made besides those that a file has some for: projections that are drawn."""


def load_adapter(model: nn.Module, path: str | os.PathLike[str], *, name: str = "default") -> None:
    """Load an adapter directory, written by this package or by HF PEFT, into ``model``.

    The adapter is injected if the model has none of this name; otherwise its tensors are replaced.

    Args:
        model: The base model, or a LightningModule that holds it.
        path: The directory.
        name: The adapter's name in ``model``.

    Raises:
        PEFTError: The directory is missing, damaged, not as it was written, holds NaN, or belongs to another base or
            method. The model is as it was before.
    """
    view = resharded(model)
    refuse_merged(view, "load an adapter")
    directory = as_path(path)
    restore_interrupted(directory)
    check_manifest(directory, FILES)
    marker = read_marker(directory)
    if not marker:
        refuse_other_tools(directory)
        read_config(directory)  # says so, if there is no adapter at all
    if "parts" in marker:
        places = {prefix: inside(directory, prefix) for prefix in marker["parts"]}
        if unknown := sorted(places.keys() - view.modules.keys()):
            raise PEFTError(f"{directory} holds an adapter for {unknown[0]!r}; the model has no such part.")
    else:
        places = {_root_of(view, marker): directory}
    with patterns_of_a_file():
        loads = [_Load.prepare(view, prefix, place, name) for prefix, place in places.items()]
    beside = _read_beside(view, directory, marker, next(iter(places)))
    for load in loads:
        load.run()
    _load_beside(view, beside)
    if lost := [module for module in marker.get("extra", ()) if module in view.modules]:
        warnings.warn(
            f"{directory} was written beside state of {listed(map(repr, lost))} that is neither parameter nor buffer, "
            "for which an adapter has no place. It is as it was; load_from_checkpoint, or ckpt_path, gives a module "
            "what a checkpoint of the run has.",
            stacklevel=2,
        )


@dataclass
class _Load:
    """One adapter directory, read and checked against the part of the model that it is for."""

    model: ModelView
    prefix: str
    tensors: dict[str, Tensor]
    """By name in the model as a whole."""
    targets: dict[str, Tensor]
    """What they are copied to, likewise."""
    name: str
    prepared: Prepared | None
    """The adapter to inject, if the model has none of this name."""

    @classmethod
    def prepare(cls, model: ModelView, prefix: str, directory: Path, name: str) -> _Load:
        root = model.part(prefix)
        config, file, marker = read_config(directory), directory / TENSOR_FILE, read_marker(directory)
        config.pop(UNSAID, None)
        config.update({UNSAID: marker[UNSAID]} if UNSAID in marker else {})
        stored, source = read_tensors(file), str(directory)
        config, stored = with_experts_joined(root, config, stored, source)
        shapes = {key: tuple(tensor.shape) for key, tensor in stored.items()}
        if config.get("peft_type") == own.PEFT_TYPE:
            content = own.read_content(config, shapes, source)
        else:
            content = hf.read_content(root, config, shapes, source)
        if marker:
            refuse_other_base(model, marker.get("base", {}), source, prefix)
        lead = f"{prefix}." if prefix else ""
        _refuse_changed_base(root, {name: stored.pop(key) for key, name in content.copies.items()}, source)
        if extra := sorted(stored.keys() - {whole_of(key) for key in content.names} - content.unused):
            raise PEFTError(f"{source} holds {extra[0]!r}, which its configuration does not explain. It is damaged.")
        tensors = {
            f"{lead}{with_adapter(in_model, name)}": take(stored, key)
            for key, in_model in content.names.items()
            if whole_of(key) in stored
        }
        present, prepared = _present(model, prefix, name), None
        if present is not None:
            refuse_other_methods(present, [method.config() for method in content.methods], source, names_only=True)
            adapters = adapters_of(model, lead, name)
            tensors = {key: converted(adapters, key, tensor, back=True) for key, tensor in tensors.items()}
            targets = {key: t for key, t in adapter_parameters_and_whole(model).items() if key.startswith(lead)}
            targets = {key: t for key, t in targets.items() if with_adapter(without_adapter(key), name) == key}
        else:
            _refuse_within(model, prefix, source)
            # Files of others have no place for some buffers, and hold zeros where parts of a layer are not adapted.
            with parameters_left_empty(), Allowance(8 * sum(t.numel() for t in stored.values()) + _MORE, source):
                prepared = prepare_injection(root, content.methods, name, content.train_also)
            targets = {f"{lead}{key}": t for key, t in prepared_tensors(root, prepared, name).items()}
        # Formats of others have no place for some buffers of adapters, which start anew.
        expected = {k: t for k, t in targets.items() if k in tensors or not _is_adapter_buffer(k, t)}
        check_tensors(expected, tensors, source)
        return cls(model, prefix, tensors, targets, name, prepared)

    def run(self) -> None:
        if self.prepared is not None:
            inject_prepared(self.model.part(self.prefix), self.prepared, self.name)
        for key, tensor in self.tensors.items():
            replace(self.targets[key], tensor)


def _present(model: ModelView, prefix: str, adapter: str) -> tuple[PEFTMethod, ...] | None:
    """Return the methods of the adapter in the part ``prefix`` of ``model``, if it has one of that name."""
    for found, _, registry in registries(model):
        names = [f"{found}.{name}".lstrip(".") for name in (*registry.hosts.get(adapter, ()), *registry.chosen)]
        if adapter in registry.methods and any(not prefix or name.startswith(f"{prefix}.") for name in names):
            return registry.methods[adapter]
    return None


def _refuse_within(model: ModelView, prefix: str, source: str) -> None:
    """Check that the part ``prefix`` of ``model``, for which ``source`` is, can get adapters of its own.

    Raises:
        PEFTError: It has some already, which were injected into a larger part.
    """
    if own_registry(model.part(prefix).module) is not None:
        return
    for outer, module, _ in adapted(model):
        if outer != prefix and (not outer or prefix.startswith(f"{outer}.")):
            raise PEFTError(
                f"{source} holds an adapter for {prefix!r}, which has adapters already that were injected into the "
                f"{type(module).__name__} around it. Load each of them, with a name of its own, by load_adapter into a "
                f"module without adapters; or inject the first one into {prefix!r} itself."
            )


def _is_adapter_buffer(name: str, tensor: Tensor) -> bool:
    return not isinstance(tensor, nn.Parameter) and CHILD in name.split(".")


def _read_beside(model: ModelView, directory: Path, marker: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """Read what is trained whole and belongs to no adapted model, and what has changed of the base.

    Args:
        model: The model to load into.
        directory: The directory.
        marker: Its marker, which has the name that the part had where it was written.
        prefix: The part's name in ``model``. If it is another one, what was around the part is left out.
    """
    file = directory / BESIDE_FILE
    if not file.is_file():
        return {}
    # What adapters have there is for going on with the training that wrote it.
    tensors = {name: tensor for name, tensor in read_tensors(file).items() if name == without_adapter(name)}
    if "parts" not in marker and (written := str(marker.get("prefix", ""))) != prefix:
        inside, lead = f"{written}." if written else "", f"{prefix}." if prefix else ""
        tensors = {lead + n.removeprefix(inside): t for n, t in tensors.items() if n.startswith(inside)}
    buffers, parameters = model.buffers, model.parameters
    # Buffers may have grown.
    targets = {n: parameters.get(n, tensor) for n, tensor in tensors.items() if n in parameters or n in buffers}
    check_tensors(targets, tensors, str(file))
    return tensors


def _load_beside(model: ModelView, beside: Mapping[str, Tensor]) -> None:
    if not beside:
        return
    targets = {**model.buffers, **model.parameters}
    for name, tensor in beside.items():
        assign(targets[name], tensor)
    adapted = ModelView(model.module)
    inside = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, _, _ in registries(adapted)
        for name in adapted.part(prefix).parameters
    }
    note_moved(adapted, (beside.keys() & inside) - adapter_parameters_and_whole(adapted).keys())


def _refuse_changed_base(root: ModelView, copies: Mapping[str, Tensor], source: str) -> None:
    for name, tensor in copies.items():
        present = whole(cast(Tensor, root.parameter(name)))
        if present.shape != tensor.shape or not torch.allclose(present.cpu(), tensor.to(present.dtype), atol=1e-6):
            raise PEFTError(
                f"{source} brings its own {name} {list(tensor.shape)}, which is not the model's "
                f"{list(present.shape)}: it was trained with other embeddings (new tokens?). Resize the model's "
                "embeddings and load those weights into it first."
            )


def _root_of(model: ModelView, marker: Mapping[str, Any]) -> str:
    """Return the name of the part of ``model`` that an adapter directory is about."""
    if not is_lightning_module(model.module):
        return ""
    recorded = marker.get("prefix")
    if marker.get("lightning") and isinstance(recorded, str):
        return recorded
    inner = list(transformers_models(model))
    if len(inner) == 1:
        return inner[0]
    if isinstance(recorded, str) and recorded in model.modules:
        return recorded
    raise PEFTError(
        f"{model.kind} holds {len(inner)} transformers models, so it is not clear which one the adapter is "
        "for. Pass that model: load_adapter(module.model, path)."
    )


def read_adapters(directory: Path, places: Mapping[str, list[str]]) -> dict[str, Tensor]:
    """Read back what :func:`write_adapters` wrote, given what it returned.

    Raises:
        PEFTError: A file is missing or damaged, or lacks a tensor.
    """
    files = {file: read_tensors(inside(directory, file)) for file in {place[0] for place in places.values()}}
    try:
        return {name: take(files[file], in_file) for name, (file, in_file) in places.items()}
    except KeyError as error:
        raise PEFTError(f"{directory} lacks the tensor {error}: it is damaged. Take another checkpoint.") from error
