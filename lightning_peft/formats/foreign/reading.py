"""Which tools' adapters are read, and how: as directories of HF PEFT's, which are read as any other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from lightning_peft.core.view import ModelView
from lightning_peft.files.contents import write_json, write_tensors
from lightning_peft.formats.content import CONFIG_FILE, TENSOR_FILE
from lightning_peft.formats.foreign.litgpt import read_litgpt
from lightning_peft.formats.foreign.low_rank import ForeignLoRA
from lightning_peft.formats.foreign.mlx import read_mlx

READERS: Mapping[str, Callable[[Path, ModelView], ForeignLoRA]] = {"LitGPT": read_litgpt, "MLX": read_mlx}
"""By the name of the tool, as :mod:`lightning_peft.files.others` knows it by sight."""


def write_in_hf(tool: str, path: Path, root: ModelView, out: Path) -> None:
    """Write an adapter of ``tool``, which is for ``root``, as HF PEFT would, into the directory ``out``.

    Raises:
        PEFTError: It is damaged, or for another model.
    """
    config, tensors = READERS[tool](path, root).in_hf(root, str(path))
    write_json(out / CONFIG_FILE, config)
    write_tensors(out / TENSOR_FILE, tensors)
