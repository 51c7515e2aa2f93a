"""Base weights from safetensors files, read piece by piece into a model that may be in pieces itself."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_peft.core.adapter import CHILD, clean_name, unwrap
from lightning_peft.core.registry import registries
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.files.contents import inside, open_tensors, read_json
from lightning_peft.operations.shards import gathered
from lightning_peft.structure.inner_models import transformers_models
from lightning_peft.tensors.sharding import local_part, local_slices

_FILE = "model.safetensors"
_INDEX = f"{_FILE}.index.json"


def load_base_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load the frozen weights of ``model`` from what ``save_pretrained`` wrote, one tensor at a time.

    For models that were built without weights (``trainer.init_module(empty_init=True)``): of a tensor that is sharded
    over processes each reads its own part only. Adapters, and modules trained whole that the files do not have, are
    left alone. Buffers that no file holds, such as rotary frequencies, are computed again by transformers models.

    Args:
        model: A model whose parameters are no longer on the meta device, injected or not; or a LightningModule that
            holds one transformers model.
        path: A directory with ``model.safetensors``, or with its shards and their index. Transformers saves some
            architectures under the names of an older version: use ``save_pretrained(..., save_original_format=False)``.

    Raises:
        PEFTError: A file is missing or damaged, or its names (then nothing was loaded) or shapes are not the model's.
    """
    root = _root(unwrap(model))
    _restore_buffers(root)
    with ExitStack() as stack:
        entries = [entry for file in weight_files(Path(path)) for entry in _named(stack, file)]
        stored = {name: _Stored(file.get_slice(name)) for file, name in entries}
        fill(root, stored, str(path))


def fill(root: nn.Module, stored: Mapping[str, Any], source: str) -> None:
    """Copy ``stored``, whole tensors by name, into the base part of ``root``, which may be in pieces.

    Raises:
        PEFTError: Names (then nothing was copied) or shapes are not those of ``root``.
    """
    slots = _slots(root)
    _check(root, slots, stored, source)
    for module, own in slots:
        with gathered(module), torch.no_grad():
            for attribute, aliases in own.items():
                target = cast(Tensor, getattr(module, attribute))
                name = next((alias for alias in aliases if alias in stored), None)
                if name is None:
                    continue
                if tuple(stored[name].shape) != tuple(target.shape):
                    raise PEFTError(
                        f"{source}: {name} has shape {list(stored[name].shape)}, the model's {list(target.shape)}. "
                        "Load the weights of the model that this one's configuration describes."
                    )
                local_part(target).copy_(stored[name][local_slices(target)])


def map_base_weights(root: nn.Module, directory: Path) -> None:
    """Give a transformers model that was made on the meta device the tensors of files, as they lie in them.

    Of what is not used nothing is read: the system maps files into memory.

    Raises:
        PEFTError: A file is missing or damaged, or its names or shapes are not those of ``root``.
    """
    slots = _slots(root)
    with ExitStack() as stack:
        stored = {name: file for path in weight_files(directory) for file, name in _named(stack, path)}
        _check(root, slots, stored, str(directory))
        for module, own in slots:
            for attribute, aliases in own.items():
                if (name := next((alias for alias in aliases if alias in stored), None)) is not None:
                    _put(module, attribute, stored[name].get_tensor(name), f"{directory}: {name}")
    cast(Any, root).tie_weights()


def weight_files(directory: Path) -> list[Path]:
    """Return the files in which ``save_pretrained`` has written weights.

    Raises:
        PEFTError: One lies outside of ``directory``.
    """
    names = [_FILE]
    if (directory / _INDEX).is_file():
        entries = read_json(directory / _INDEX).get("weight_map")
        names = sorted(set(map(str, entries.values()))) if isinstance(entries, dict) else []
    return [inside(directory, name) for name in names]


def _named(stack: ExitStack, path: Path) -> Iterator[tuple[Any, str]]:
    file = stack.enter_context(open_tensors(path))
    return ((file, name) for name in file.keys())  # noqa: SIM118 (no dict)


def _put(module: nn.Module, attribute: str, tensor: Tensor, source: str) -> None:
    present = getattr(module, attribute)
    if present.shape != tensor.shape:
        raise PEFTError(
            f"{source} has shape {list(tensor.shape)}, the model's {list(present.shape)}. Take the files of the model "
            "that the configuration describes."
        )
    is_parameter = isinstance(present, nn.Parameter)
    setattr(module, attribute, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


class _Stored:
    """A tensor in a file, of which only the part that is asked for is read."""

    def __init__(self, entry: Any) -> None:
        self._entry = entry
        self.shape = tuple(entry.get_shape())

    def __getitem__(self, where: tuple[slice, ...]) -> Tensor:
        part: Tensor = self._entry[where or ...]
        return part


def materialise(module: nn.Module, device: torch.device) -> None:
    """Give ``module``, all of it, memory on ``device``; what was on the meta device gets its initial values."""
    for part in module.modules():
        allocate(part, device)
    module.to(device)


def allocate(module: nn.Module, device: torch.device, *, initialise: bool = True) -> None:
    """Give the tensors of ``module`` itself memory on ``device`` if they have none, and initial values if asked to."""
    if has_meta(module):
        module.to_empty(device=device, recurse=False)
        if initialise and callable(reset := getattr(module, "reset_parameters", None)):
            reset()


def has_meta(module: nn.Module) -> bool:
    """Whether a tensor of ``module`` itself has no memory."""
    return any(tensor.is_meta for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)])


def _root(model: nn.Module) -> nn.Module:
    """Return the transformers model inside ``model`` if there is one, whose names the files have."""
    inner = list(transformers_models(ModelView(model)).values())
    if len(inner) > 1:
        raise PEFTError(
            f"{type(model).__name__} holds {len(inner)} transformers models, so it is not clear whose weights to load. "
            "Load them one by one with load_base_weights(module.model, path)."
        )
    return inner[0] if inner else model


def _restore_buffers(root: nn.Module) -> None:
    initialise = getattr(root, "_init_weights", None)
    if initialise is not None:
        for module in root.modules():
            if module._non_persistent_buffers_set:
                initialise(module)


def _slots(root: nn.Module) -> list[tuple[nn.Module, dict[str, set[str]]]]:
    """Return each module with the attributes that hold its own saved tensors, and the names that each may have."""
    ties: dict[str, str] = getattr(root, "all_tied_weights_keys", None) or {}
    names: dict[int, set[str]] = {}
    found: list[tuple[nn.Module, dict[str, set[str]]]] = []
    modules = [(clean_name(n), m) for n, m in root.named_modules(remove_duplicate=False)]
    modules = [(name, module) for name, module in modules if CHILD not in name.split(".")]
    for name, module in modules:
        for attribute, tensor in _own(module):
            full_name = f"{name}.{attribute}".lstrip(".")
            # Two tensors by now, if they were made on the meta device: the files have the first alone.
            names.setdefault(id(tensor), set()).update({full_name, ties.get(full_name, full_name)})
    seen: set[int] = set()
    for _, module in modules:
        own = {a: names[id(t)] for a, t in _own(module) if id(t) not in seen}
        seen |= {id(t) for _, t in _own(module)}
        if own:
            found.append((module, own))
    return found


def _own(module: nn.Module) -> list[tuple[str, Tensor]]:
    buffers = [(n, b) for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set]
    return [(name, tensor) for name, tensor in [*module._parameters.items(), *buffers] if tensor is not None]


def _check(root: nn.Module, slots: list[Any], names: Mapping[str, Any], source: str) -> None:
    trained = {name for _, _, registry in registries(ModelView(root)) for name in registry.whole}
    known = {alias for _, own in slots for aliases in own.values() for alias in aliases}
    missing = [
        min(aliases)
        for _, own in slots
        for aliases in own.values()
        if not aliases & names.keys() and not aliases & trained
    ]
    extra = sorted(names.keys() - known)
    if missing or extra:
        raise PEFTError(
            f"The weights in {source} do not fit this {type(root).__name__}: {len(missing)} are missing "
            f"({', '.join(sorted(missing)[:3]) or 'none'}), {len(extra)} are superfluous "
            f"({', '.join(extra[:3]) or 'none'}). Name what save_pretrained of the same class wrote, with "
            "save_original_format=False if names differ there."
        )
