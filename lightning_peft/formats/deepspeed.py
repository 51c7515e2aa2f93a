"""DeepSpeed's checkpoints: a directory with the parts of weights and optimizer state that each process held.

What a single file would hold of the module stands in there once more, whole: DeepSpeed leaves out what is frozen, and
reads a tensor that modules share under all of its names. Optimizer state is cut up in an order that the files do not
tell: :data:`MARKER` records it, so that it is never read into other places. DeepSpeed keeps pickles in there, which it
offers no other way to read: unlike all other files, these directories are to be read from trusted places only, and only
runs on DeepSpeed read them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_peft.errors import PEFTError
from lightning_peft.files.contents import MARKER, read_json, write_json
from lightning_peft.files.manifest import check_manifest

TAG = "checkpoint"
"""Under this name Lightning has DeepSpeed write."""

_KEY = "deepspeed"
_STATE = "lightning_peft_state"


def with_state(checkpoint: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return ``checkpoint`` with those tensors of its ``state_dict`` where DeepSpeed leaves them as they are."""
    return {**checkpoint, _STATE: {name: checkpoint["state_dict"][name] for name in names}}


def write_layout(directory: Path, stage: int, processes: int, groups: Sequence[Sequence[str]]) -> None:
    """Mark ``directory`` as ours and DeepSpeed's.

    Args:
        directory: What DeepSpeed wrote.
        stage: Stage of ZeRO.
        processes: How many there were.
        groups: Names of the trained parameters, by param group, in the order in which they were cut up.
    """
    layout = {"stage": stage, "processes": processes, "groups": [list(group) for group in groups]}
    write_json(directory / MARKER, {"version": 1, _KEY: layout})


def is_deepspeed(path: Path) -> bool:
    """Whether ``path`` is a directory of DeepSpeed's that was written by ``PEFTStrategy``."""
    return (path / MARKER).is_file() and _KEY in read_json(path / MARKER)


def require_layout(path: Path, stage: int, processes: int, groups: Sequence[Sequence[str]] | None = None) -> None:
    """Check that optimizer state can be read from ``path`` as it was written.

    Args:
        path: What :func:`write_layout` marked.
        stage: Stage of ZeRO now.
        processes: How many there are now.
        groups: Names of the trained parameters now, if they are known yet.

    Raises:
        PEFTError: It cannot.
    """
    found = read_json(path / MARKER)[_KEY]
    for what, now in (("stage", stage), ("processes", processes)):
        if found.get(what) != now:
            raise PEFTError(
                f"{path} was written by DeepSpeed with {what}={found.get(what)}; this run has {what}={now}, and its "
                "optimizer state is cut up for that of the writer. Resume as it was written; a checkpoint of "
                "AdapterCheckpoint resumes on any number of processes and every base strategy."
            )
    if groups is not None and found.get("groups") != [list(group) for group in groups]:
        raise PEFTError(
            f"{path} was written with other param groups than configure_optimizers made now, or with their parameters "
            "in another order. Make those that it was saved with."
        )


def read_deepspeed(path: Path, weights_only: bool | None = None) -> dict[str, Any]:
    """Read such a directory as the checkpoint that would have been written as a single file, but for optimizer state.

    Raises:
        PEFTError: It is damaged, or not as it was written.
    """
    check_manifest(path)
    try:
        files = sorted((path / TAG).glob("*_model_states.pt"))
        checkpoint: dict[str, Any] = torch.load(files[0], map_location="cpu", weights_only=weights_only is not False)
        base = checkpoint["module"] if checkpoint["lightning_peft"]["full"] else {}
        state = {**base, **checkpoint.pop(_STATE)} if _STATE in checkpoint else _read_parts(path, not base)
    except Exception as error:
        raise PEFTError(
            f"{path} cannot be read as a checkpoint of DeepSpeed: {error}. Take another checkpoint."
        ) from error
    # Only a checkpoint of weights alone has no schedulers; Lightning tells the two apart by these keys.
    rest: dict[str, Any] = {"optimizer_states": []} if "lr_schedulers" in checkpoint else {}
    return {**checkpoint, **rest, "state_dict": state}


def _read_parts(path: Path, trained_only: bool) -> dict[str, Any]:
    """Put together what the processes of release 0.1 wrote."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    state: dict[str, Any] = get_fp32_state_dict_from_zero_checkpoint(
        str(path), tag=TAG, exclude_frozen_parameters=trained_only
    )
    return state
