"""Which tools' adapters are read, and how: as directories of HF PEFT's, which are read as any other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from lightning_peft.core.view import ModelView
from lightning_peft.files.contents import write_json, write_tensors
from lightning_peft.files.others import name_of_tool
from lightning_peft.formats.content import CONFIG_FILE, TENSOR_FILE
from lightning_peft.formats.foreign.lightning_file import read_lightning_file
from lightning_peft.formats.foreign.litgpt import read_litgpt
from lightning_peft.formats.foreign.low_rank import ForeignLoRA
from lightning_peft.formats.foreign.mlx import read_mlx

READERS: Mapping[str, Callable[[Path, ModelView], ForeignLoRA]] = {"LitGPT": read_litgpt, "MLX": read_mlx}
"""By the name of the tool, as :mod:`lightning_peft.files.others` knows it by sight."""


LIGHTNING = "Lightning"


def tool_of(path: Path) -> str | None:
    """Return whose format a path is in, if it is one that is read here."""
    if path.suffix == ".ckpt" and path.is_file():
        return LIGHTNING
    tool = name_of_tool(path)
    return tool if tool in READERS else None


def write_in_hf(tool: str, path: Path, root: ModelView, out: Path, alpha: float | None) -> None:
    """Write an adapter of ``tool``, which is for ``root``, as HF PEFT would, into the directory ``out``.

    Args:
        tool: As :func:`tool_of` returned it.
        path: The adapter.
        root: The base model.
        out: The directory.
        alpha: For :func:`~lightning_peft.formats.foreign.lightning_file.read_lightning_file` alone.

    Raises:
        PEFTError: It is damaged, or for another model.
    """
    read = read_lightning_file(path, root, alpha) if tool == LIGHTNING else READERS[tool](path, root)
    config, tensors = read.in_hf(root, str(path))
    write_json(out / CONFIG_FILE, config)
    write_tensors(out / TENSOR_FILE, tensors)
