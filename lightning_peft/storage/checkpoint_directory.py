"""Lightning checkpoints as directories that HF PEFT reads too."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.files.contents import refuse_unreadable_name
from lightning_peft.files.leftovers import restore_interrupted
from lightning_peft.files.manifest import check_manifest, write_manifest
from lightning_peft.files.remote import is_remote
from lightning_peft.files.writing import atomic_directory
from lightning_peft.formats.deepspeed import is_deepspeed
from lightning_peft.formats.distributed import is_sharded, read_sharded
from lightning_peft.storage.checkpoint import KEY, checkpoint_metadata
from lightning_peft.storage.loading import read_adapters
from lightning_peft.storage.readable import TRAINER_STATE, reading
from lightning_peft.storage.saving import FILES, about, write_adapters

_PLACES = "tensors"
_OTHERS = "sparse"
"""Under it is what has no place beside the adapters: sparse tensors, and what hooks of the run have added."""


class AdapterDirectory:
    """Passed as ``storage_options`` to ``trainer.save_checkpoint``, asks for a directory instead of a file."""


def write_directory(checkpoint: Mapping[str, Any], path: str | os.PathLike[str], model: ModelView) -> None:
    """Write ``checkpoint`` as a directory: the adapters in HF PEFT's format, the rest in a file beside them.

    Raises:
        PEFTError: The path is no local one, is not ours to replace, or cannot be written to.
    """
    refuse_remote(path)
    rest = {key: value for key, value in checkpoint.items() if key != "state_dict"}
    state = checkpoint["state_dict"]
    # Which safetensors files have no form for.
    sparse = {n: t for n, t in state.items() if isinstance(t, Tensor) and t.layout is not torch.strided}
    with atomic_directory(path) as directory:
        places = write_adapters(directory, model, {n: t for n, t in state.items() if n not in sparse})
        others = {name: value for name, value in state.items() if name not in places}
        with (directory / TRAINER_STATE).open("wb") as file:
            torch.save({**rest, KEY: {**checkpoint[KEY], _PLACES: places, _OTHERS: others}}, file)
        write_manifest(directory, about(model, checkpoint))


def refuse_remote(path: str | os.PathLike[str]) -> None:
    """Check that ``path`` is one to which directories are written.

    Raises:
        PEFTError: It is no local one, or safetensors could not read what is there.
    """
    if is_remote(path):
        raise PEFTError(f"{path}: adapter directories are written to local paths. Use ModelCheckpoint for remote ones.")
    refuse_unreadable_name(Path(path))


def is_directory(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is an adapter directory, also if a crash left it with its old content aside."""
    if is_remote(path):
        return False
    restore_interrupted(path)
    return Path(path).is_dir()


def read_directory(
    path: str | os.PathLike[str], weights_only: bool | None = None, sharded: bool = False
) -> dict[str, Any]:
    """Read what :func:`write_directory` wrote, as the checkpoint that it was; or another layout, if that is asked for.

    Args:
        path: The directory.
        weights_only: As for ``torch.load``. With ``False`` every layout is read, and pickles in it are run.
        sharded: Whether Lightning's sharded checkpoints are expected.

    Raises:
        PEFTError: The directory holds no trainer state, is of a layout that was not asked for, or is damaged.
    """
    directory = Path(path)
    file = directory / TRAINER_STATE
    if not file.is_file():
        if is_sharded(directory) and (sharded or weights_only is False):
            return read_sharded(directory, weights_only)
        raise _unreadable(directory)
    check_manifest(directory, (*FILES, TRAINER_STATE))
    with reading(file):
        checkpoint = torch.load(file, map_location="cpu", weights_only=weights_only is not False)
    saved = checkpoint_metadata(checkpoint)
    state: dict[str, Tensor] = {**read_adapters(directory, saved[_PLACES]), **saved.get(_OTHERS, {})}
    return {**checkpoint, "state_dict": state}


def _unreadable(directory: Path) -> PEFTError:
    """Return the error for a directory that has no trainer state of ours."""
    if is_sharded(directory):
        return PEFTError(
            f"{directory} is a sharded checkpoint, which this run's base strategy does not write. Use the base "
            "strategy that wrote it or, if you trust whoever did, pass weights_only=False. Checkpoints of "
            "AdapterCheckpoint resume on every base strategy."
        )
    if is_deepspeed(directory):
        return PEFTError(
            f"{directory} was written by DeepSpeed, which alone reads it. Use the base strategy that wrote it; "
            "checkpoints of AdapterCheckpoint resume on every base strategy."
        )
    return PEFTError(
        f"{directory} holds no {TRAINER_STATE}, so training cannot be resumed from it. An adapter is loaded "
        "with load_adapter(model, path), and ckpt_path left out."
    )
