"""LoRA and DoRA of mlx-lm, as `mlx_lm/tuner/lora.py` 200af25, `dora.py` 35d46a9 and `utils.py` 0367286 have them.

Its modules are called as transformers' are. A and B are stored transposed, and multiplied by a scale as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_peft.core.schema import check_values
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.files.contents import read_json, read_tensors
from lightning_peft.formats.foreign.low_rank import ForeignLoRA

_CONFIG, _TENSORS = "adapter_config.json", "adapters.safetensors"
_PARTS = {"lora": ("lora_a", "lora_b"), "dora": ("lora_a", "lora_b", "m")}
"""The tensors of a module, by what ``fine_tune_type`` says."""


def read_mlx(path: Path, root: ModelView) -> ForeignLoRA:
    """Read a directory of mlx-lm's.

    Raises:
        PEFTError: It is damaged, or not of linear layers alone.
    """
    if not (path / _TENSORS).is_file():
        raise PEFTError(f"{path} has no {_TENSORS}, which mlx-lm writes today: convert it there, or fuse it.")
    config = read_json(path / _CONFIG)
    kind, said = config.get("fine_tune_type", "lora"), config.get("lora_parameters")
    if kind not in _PARTS:
        raise PEFTError(f"{path} has fine_tune_type={kind!r}; {', '.join(map(repr, _PARTS))} can be read.")
    numbers = said if isinstance(said, dict) else {}
    check_values(numbers, {"rank": int, "scale": float, "dropout": float}, f"{path / _CONFIG}: lora_parameters")
    if missing := {"rank", "scale"} - numbers.keys():
        raise PEFTError(f"{path / _CONFIG} has no {min(missing)!r} in lora_parameters. It is damaged.")
    modules = _modules(read_tensors(path / _TENSORS), _PARTS[kind], path)
    return ForeignLoRA(
        r=numbers["rank"],
        alpha=numbers["scale"] * numbers["rank"],
        dropout=numbers.get("dropout", 0.0),
        factors={name: (found["lora_a"].T, found["lora_b"].T) for name, found in modules.items()},
        magnitudes={name: found["m"] for name, found in modules.items() if "m" in found},
    )


def _modules(tensors: dict[str, Tensor], parts: tuple[str, ...], path: Path) -> dict[str, dict[str, Any]]:
    """Return the tensors of each module."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part not in parts or tensor.dim() != (1 if part == "m" else 2):
            raise PEFTError(
                f"{path / _TENSORS} holds {name!r} of the shape {list(tensor.shape)}, which is none of a LoRA of a "
                "linear layer. Fuse it with mlx_lm.fuse --dequantize, and convert the model that this writes."
            )
        modules.setdefault(module, {})[part] = tensor
    if lost := [name for name, found in modules.items() if len(found) < len(parts)]:
        raise PEFTError(f"{path / _TENSORS}: {lost[0]!r} lacks one of {', '.join(parts)}. It is damaged.")
    return modules
