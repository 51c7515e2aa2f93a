"""Writing adapters as directories."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from lightning_peft.core.adapter import CHILD, Adapter
from lightning_peft.core.registry import changed, registries, required
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError, listed
from lightning_peft.files.card import write_card
from lightning_peft.files.contents import MARKER, write_json, write_tensors
from lightning_peft.files.manifest import write_manifest
from lightning_peft.files.writing import atomic_directory
from lightning_peft.formats import hf, own
from lightning_peft.formats.addition import Form, form_of
from lightning_peft.formats.configuration import read_marker
from lightning_peft.formats.content import CONFIG_FILE, TENSOR_FILE, Part, with_adapter
from lightning_peft.formats.counterpart import UNSAID
from lightning_peft.formats.pieces import joined
from lightning_peft.operations.shards import resharded
from lightning_peft.storage.fingerprint import describe_base, identity
from lightning_peft.storage.parts import parts_of
from lightning_peft.storage.state import adapter_parameters_and_whole, adapter_state
from lightning_peft.structure.extra_state import by_name, extra_state
from lightning_peft.structure.inner_models import is_lightning_module
from lightning_peft.tensors.sharding import map_tensors, whole

BESIDE_FILE = "trained_whole.safetensors"
"""What is trained whole and belongs to no adapted model, and what has changed of the base without being trained."""

FILES = (CONFIG_FILE, TENSOR_FILE, MARKER, BESIDE_FILE)
"""What is read of a directory, and of those in it."""


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    card: bool | Mapping[str, Any] = False,
) -> None:
    """Write an adapter as a directory, in HF PEFT's format if HF PEFT has the method.

    ``PeftModel.from_pretrained(base, path)`` reads that. Other methods, and several methods together but for LoRA with
    :class:`BitFit` and :class:`NewTokens`, are written in a format of this package's own, which HF PEFT
    refuses. A LightningModule that holds one model gives that model's adapter; one that holds several gives a
    subdirectory for each. If a model is in pieces on several processes, each of them has to call this, with one path or
    a path of its own.

    Args:
        model: A model with adapters, merged or not.
        path: The directory to write; one that this function wrote before is replaced, atomically.
        name: Which adapter; the active one if not given.
        card: Whether to write a model card beside the adapter, a README.md for a model hub; or what it is to say that
            the adapter does not tell: ``{"data": "my-data", "metrics": {"accuracy": 0.93}}``.

    Raises:
        PEFTError: There is no such adapter, or ``path`` cannot be written or is not ours to replace.
    """
    view = resharded(model)
    found = required(view)
    name = name or found[0][2].active
    if not any(name in registry.methods for _, _, registry in found):
        known = sorted({adapter for _, _, registry in found for adapter in registry.methods})
        raise PEFTError(f"There is no adapter {name!r}. Adapters: {', '.join(known)}.")
    state = map_tensors(adapter_state(view), whole)
    if beyond := by_name(extra_state(view)):
        warnings.warn(
            f"Modules keep in their state what is neither parameter nor buffer ({listed(beyond)}). The directory of an "
            "adapter has no place for it. Checkpoints of a run do, as does the module's state_dict().",
            stacklevel=2,
        )
    with atomic_directory(path) as directory:
        write_adapters(directory, view, state, names=[name])
        for config in directory.rglob(CONFIG_FILE) if card else ():
            write_card(config.parent, CONFIG_FILE, TENSOR_FILE, {} if isinstance(card, bool) else card)
        write_manifest(directory, about(view))


def about(model: ModelView, checkpoint: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """Return what a manifest says of a directory: its place in a run, methods and bases."""
    methods = {
        prefix: {name: [method.name for method in methods] for name, methods in registry.methods.items()}
        for prefix, _, registry in registries(model)
    }
    bases = {prefix: identity(model.part(prefix)) for prefix in methods}
    return {"step": checkpoint.get("global_step"), "epoch": checkpoint.get("epoch"), "methods": methods, "base": bases}


def write_adapters(
    directory: Path, model: ModelView, state: Mapping[str, Tensor], names: Iterable[str] | None = None
) -> dict[str, list[str]]:
    """Write the adapters ``names`` (all, if not given) into an existing directory.

    Modules trained whole that belong to no adapted model, such as a head beside it, go into a file of their own: HF
    PEFT has no place for them. So does what has changed of the base, and, if all adapters are written, their buffers
    that it does not write.

    Returns:
        For every tensor of ``state`` written, by name: ``[file, name in the file]``.
    """
    places: dict[str, list[str]] = {}
    parts, beside = parts_of(model, names)
    # What modules have in their state that is neither parameter nor buffer has a place in the files of runs alone.
    marker: dict[str, Any] = {"version": 1, **({"extra": list(extra)} if (extra := extra_state(model)) else {})}
    several = len({part.prefix for part in parts}) > 1
    adapters = [part.adapter for part in parts]
    primary = "default" if "default" in adapters else adapters[0]
    for part in parts:
        # HF PEFT puts every adapter but "default" into a subdirectory of its name.
        segments = [part.prefix if several else "", "" if part.adapter == primary else part.adapter]
        subdirectory = "/".join(segment for segment in segments if segment)
        for in_file, in_model in _write_part(directory / subdirectory, model, part, state, marker).items():
            places[in_model] = [f"{subdirectory}/{TENSOR_FILE}".lstrip("/"), in_file]
    others = model.adapter_tensors if names is None else {}
    beside += sorted(state.keys() & {*others, *(name for name, _, _ in changed(model))} - places.keys())
    if beside:
        write_tensors(directory / BESIDE_FILE, {name: state[name] for name in beside})
        places.update({name: [BESIDE_FILE, name] for name in beside})
    if several:
        # What is adapted around those models stands in the directory itself, with a marker of its own.
        around = read_marker(directory) or marker
        write_json(directory / MARKER, {**around, "parts": sorted({part.prefix for part in parts})})
    return places


def _write_part(
    directory: Path, model: ModelView, part: Part, state: Mapping[str, Tensor], marker: Mapping[str, Any]
) -> dict[str, str]:
    """Write one directory and return the tensors' names in the model by their names in the file.

    Left out are those of which the file has another form: a run does not go on from them.
    """
    root, form = model.part(part.prefix), _form(part)
    names, config = _names_and_config(root, part, state)
    directory.mkdir(parents=True, exist_ok=True)
    lead = f"{part.prefix}." if part.prefix else ""
    adapters = {} if form is None else adapters_of(model, lead, part.adapter)
    tensors = {in_file: converted(adapters, in_model, state[in_model]) for in_file, in_model in names.items()}
    write_tensors(directory / TENSOR_FILE, joined(tensors))
    write_json(directory / CONFIG_FILE, config)
    marker = {**marker, "prefix": part.prefix, "base": describe_base(model, part.prefix)}
    if form is not None and (unsaid := form.counterpart.unsaid(part.methods[form.main])):
        marker[UNSAID] = unsaid
    write_json(directory / MARKER, {**marker, "lightning": is_lightning_module(root.module)})
    return {in_file: in_model for in_file, in_model in names.items() if tensors[in_file] is state[in_model]}


def _form(part: Part) -> Form | None:
    return None if part.own_format else form_of(part.methods)


def _names_and_config(root: ModelView, part: Part, state: Iterable[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """Return what a part is in a file: the tensors' names in the model by their names there, and the configuration."""
    lead, form = f"{part.prefix}." if part.prefix else "", _form(part)
    if form is None:
        relative = [name.removeprefix(lead) for name in state if name.startswith(lead)]
        names, config = own.tensor_names(part, relative), own.config_of(root, part)
    else:
        names, config = hf.tensor_names(root, part, form), hf.config_of(root, part, form)
    return {in_file: lead + with_adapter(in_root, part.adapter) for in_file, in_root in names.items()}, config


def check_writable(model: ModelView) -> None:
    """Check that adapters have a form in a file, as :func:`write_adapters` will give it to them.

    Raises:
        PEFTError: They have not.
    """
    state = adapter_parameters_and_whole(model)
    for part in parts_of(model, None)[0]:
        root = model.part(part.prefix)
        lost = [host for host in part.hosts if host not in root.modules]
        names = [] if lost else _names_and_config(root, part, state)[0].values()
        if lost := lost or sorted(set(names) - state.keys()):
            name = f"{part.prefix}.{lost[0]}".lstrip(".")
            raise PEFTError(
                f"The adapter {part.adapter!r} cannot be written: {name!r}, which it was made for, is not in this "
                f"{model.kind} any more. Inject when the model has its final form."
            )


def adapters_of(model: ModelView, lead: str, adapter: str) -> dict[str, Adapter]:
    """Return the adapters of that name in the part of ``model`` whose names begin with ``lead``, by host."""
    found = {name: slot._modules.get(adapter) for name, _, slot in model.slots if f"{name}.".startswith(lead)}
    return {name: module for name, module in found.items() if isinstance(module, Adapter)}


def converted(adapters: Mapping[str, Adapter], name: str, tensor: Tensor, back: bool = False) -> Tensor:
    """Return the tensor ``name`` of a model in the form that a file has, or ``back`` in that of the model."""
    host, _, rest = name.rpartition(f"{CHILD}.")
    adapter = adapters.get(host.removesuffix("."))
    if adapter is None or not rest or CHILD not in name.split("."):
        return tensor
    return (adapter.from_file if back else adapter.to_file)(rest.partition(".")[2], tensor)
