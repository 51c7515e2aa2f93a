"""Lightning's sharded checkpoints: a directory with tensors in torch's distributed format and the rest in ``meta.pt``.

FSDP and ModelParallel write them. Adapter state is small: it is read whole, whatever the number of processes that wrote
it. The directory's ``.metadata`` is a pickle, which torch offers no other way to read: unlike all other files, sharded
checkpoints are to be read from trusted places only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from lightning_peft.errors import PEFTError

_METADATA = "meta.pt"
_MODELS = ("model.", "state_dict.")  # FSDP's and ModelParallel's name for the module's state
_OPTIMIZER = "optimizer_"
_VALUES = "lightning_peft_optimizer_values"


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
    return (path / _METADATA).is_file()


def read_sharded(path: Path, weights_only: bool | None = None) -> dict[str, Any]:
    """Read a sharded checkpoint as the one that would have been written as a single file.

    Raises:
        PEFTError: It is damaged.
    """
    try:
        checkpoint: dict[str, Any] = torch.load(
            path / _METADATA, map_location="cpu", weights_only=weights_only is not False
        )
        reader = FileSystemReader(path)
        stored = reader.read_metadata().state_dict_metadata
        tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in stored.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        load(tensors, storage_reader=reader, no_dist=True)
    except Exception as error:
        raise PEFTError(f"{path} cannot be read as a sharded checkpoint: {error}. Take another one.") from error
    model = {name[len(m) :]: tensor for name, tensor in tensors.items() for m in _MODELS if name.startswith(m)}
    return {**checkpoint, "state_dict": model, "optimizer_states": _optimizer_states(checkpoint, tensors)}


def _optimizer_states(checkpoint: dict[str, Any], tensors: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    states: list[dict[str, Any]] = checkpoint.pop(_VALUES, [])
    for number, state in enumerate(states):
        prefix = f"{_OPTIMIZER}{number}.state."
        for name, tensor in tensors.items():
            if name.startswith(prefix):
                parameter, _, key = name.removeprefix(prefix).rpartition(".")
                state["state"][parameter][key] = tensor
    return states
