"""Which tools' adapters are read, and how: as directories of HF PEFT's, or our own, which are read as any other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from lightning_peft.core.view import ModelView
from lightning_peft.files.contents import read_json, write_json, write_tensors
from lightning_peft.files.others import name_of_tool
from lightning_peft.formats.content import CONFIG_FILE, TENSOR_FILE
from lightning_peft.formats.foreign.adapterhub_reading import read_adapterhub
from lightning_peft.formats.foreign.image_models import read_diffusers, read_kohya
from lightning_peft.formats.foreign.lightning_file import read_lightning_file
from lightning_peft.formats.foreign.litgpt import read_litgpt
from lightning_peft.formats.foreign.mlx import read_mlx


class Foreign(Protocol):
    """What was read of another tool's adapter."""

    def as_files(self, root: ModelView, source: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the configuration and the tensors of a directory that is read here."""
        ...


READERS: Mapping[str, Callable[[Path, ModelView], Foreign]] = {
    "LitGPT": read_litgpt,
    "MLX": read_mlx,
    "AdapterHub's package adapters": read_adapterhub,
    "kohya's scripts": read_kohya,
    "diffusers": read_diffusers,
}
"""By the name of the tool, as :mod:`lightning_peft.files.others` knows it by sight."""

LIGHTNING = "Lightning"
OF_IMAGE_MODELS = ("kohya's scripts", "diffusers")
"""Tools whose adapters are for a part of an image pipeline."""


def tool_of(path: Path) -> str | None:
    """Return whose format a path is in, if it is one that is read here."""
    if path.suffix == ".ckpt" and path.is_file():
        return LIGHTNING
    tool = name_of_tool(path)
    return tool if tool in READERS else None


def write_directory(tool: str, path: Path, root: ModelView, out: Path, alpha: float | None) -> None:
    """Write an adapter of ``tool``, which is for ``root``, into the directory ``out`` in a format that is read here.

    Args:
        tool: As :func:`tool_of` returned it.
        path: The adapter.
        root: The base model.
        out: The directory.
        alpha: For :func:`~lightning_peft.formats.foreign.lightning_file.read_lightning_file` alone.

    Raises:
        PEFTError: It is damaged, or for another model.
    """
    read: Foreign = read_lightning_file(path, root, alpha) if tool == LIGHTNING else READERS[tool](path, root)
    config, tensors = read.as_files(root, str(path))
    write_json(out / CONFIG_FILE, config)
    write_tensors(out / TENSOR_FILE, tensors)


def class_named(path: Path) -> str | None:
    """Return the name of the class of the model that an adapter was trained on, if it says so."""
    config = read_json(path / CONFIG_FILE) if (path / CONFIG_FILE).is_file() else {}
    return str(config["model_class"]) if "model_class" in config else None
