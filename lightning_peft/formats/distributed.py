"""Lightning's sharded checkpoints: a directory with tensors in torch's distributed format and the rest in ``meta.pt``.

FSDP and ModelParallel write them. Adapter state is small: it is read whole, whatever the number of processes that wrote
it. torch keeps what there is in a pickle, ``.metadata``, and offers no other way to read it: here nothing is made of it
but the classes that torch writes there.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.serialization import _get_layout

from lightning_peft.errors import PEFTError
from lightning_peft.files.contents import inside
from lightning_peft.files.manifest import check_manifest
from lightning_peft.files.writing import SHARDED

_MODELS = ("model.", "state_dict.")  # FSDP's and ModelParallel's name for the module's state
_OPTIMIZER = "optimizer_"
_VALUES = "lightning_peft_optimizer_values"

_WRITTEN_BY_TORCH: dict[tuple[str, str], Any] = {
    (kind.__module__, kind.__name__): kind
    for kind in (
        _MEM_FORMAT_ENCODING,
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
        _StorageInfo,
        _get_layout,
        torch.Size,
    )
}


class _MetadataUnpickler(pickle.Unpickler):
    """Makes nothing but descriptions of tensors."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what ``.metadata`` may name."""
        if module.startswith("pathlib"):
            return PurePath  # where the checkpoint was written, on whatever system
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if (module, name) in _WRITTEN_BY_TORCH:
            return _WRITTEN_BY_TORCH[module, name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which torch does not write there")


class _Reader(FileSystemReader):
    """torch's reader, but for its way with ``.metadata``."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._directory = path

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return what tensors there are and where, all of it within the directory."""
        with (self._directory / ".metadata").open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise TypeError(f".metadata holds a {type(metadata).__name__}")
        for place in metadata.storage_data.values():
            inside(self._directory, place.relative_path)
        return metadata


def split_values(checkpoint: dict[str, Any]) -> None:
    """Leave nothing but tensors in ``checkpoint["optimizer_states"]``, and put the rest beside it.

    torch would write other values as pickles.
    """
    states = checkpoint.get("optimizer_states", [])
    checkpoint[_VALUES] = [
        {**s, "state": {n: {k: v for k, v in e.items() if not isinstance(v, Tensor)} for n, e in s["state"].items()}}
        for s in states
    ]
    checkpoint["optimizer_states"] = [
        {"state": {n: {k: v for k, v in e.items() if isinstance(v, Tensor)} for n, e in s["state"].items()}}
        for s in states
    ]


def is_sharded(path: Path) -> bool:
    """Whether ``path`` is a sharded checkpoint of Lightning's."""
    return (path / SHARDED).is_file()


def read_sharded(path: Path, weights_only: bool | None = None) -> dict[str, Any]:
    """Read a sharded checkpoint as the one that would have been written as a single file.

    Raises:
        PEFTError: It is damaged, or not as it was written.
    """
    check_manifest(path)
    try:
        checkpoint: dict[str, Any] = torch.load(
            path / SHARDED, map_location="cpu", weights_only=weights_only is not False
        )
        reader = _Reader(path)
        tensors = _room_for(reader.read_metadata(), path)
        load(tensors, storage_reader=reader, no_dist=True)
    except Exception as error:
        raise PEFTError(f"{path} cannot be read as a sharded checkpoint: {error}. Take another one.") from error
    model = {name[len(m) :]: tensor for name, tensor in tensors.items() for m in _MODELS if name.startswith(m)}
    return {**checkpoint, "state_dict": model, "optimizer_states": _optimizer_states(checkpoint, tensors)}


def _room_for(metadata: Metadata, path: Path) -> dict[str, Tensor]:
    """Return empty tensors for all that ``metadata`` lists, if the files are long enough to hold it."""
    stored = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    needed = sum(tensor.numel() * tensor.itemsize for tensor in stored.values())
    present = sum(file.stat().st_size for file in path.iterdir())
    if needed > present:
        raise ValueError(f".metadata lists {needed:,} bytes of tensors, the files have {present:,}")
    return {name: torch.empty_like(tensor, device="cpu") for name, tensor in stored.items()}


def _optimizer_states(checkpoint: dict[str, Any], tensors: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    states: list[dict[str, Any]] = checkpoint.pop(_VALUES, [])
    for number, state in enumerate(states):
        prefix = f"{_OPTIMIZER}{number}.state."
        for name, tensor in tensors.items():
            if name.startswith(prefix):
                parameter, _, key = name.removeprefix(prefix).rpartition(".")
                state["state"][parameter][key] = tensor
    return states
