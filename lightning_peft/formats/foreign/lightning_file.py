"""HF PEFT's LoRA in a Lightning checkpoint, of a module that called ``get_peft_model`` itself."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import torch
from torch import Tensor

from lightning_peft.core.adapter import CHILD
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError, listed
from lightning_peft.files.contents import read_torch
from lightning_peft.formats.foreign.low_rank import ForeignLoRA
from lightning_peft.targets.patterns import endings

_ADAPTER = re.compile(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.([^.]+))?(?:\.weight)?")
_BASE = ".base_layer.weight"
"""The end of the name of a layer's own weight, in a wrapper of HF PEFT's."""


def read_lightning_file(path: Path, root: ModelView, alpha: float | None) -> ForeignLoRA:
    """Read the LoRA of a ``.ckpt`` file; the weights of the base in it are compared with those of ``root``.

    Args:
        path: The file.
        root: The base model.
        alpha: HF PEFT's ``lora_alpha``, which stands in no tensor.

    Raises:
        PEFTError: It holds no tensors of HF PEFT's, several adapters, what else was trained, or belongs to another
            base; or alpha was not given.
    """
    state = read_torch(path, "state_dict")
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for name, tensor in state.items():
        if f".{CHILD}." in name:
            raise PEFTError(
                f"{path} is a checkpoint that PEFTStrategy wrote: MyModule.load_from_checkpoint reads it, and "
                "save_adapter writes what is read here."
            )
        if match := _ADAPTER.fullmatch(name):
            module, kind, adapter = match[1], match[2], match[3] or "default"
            found.setdefault(adapter, {}).setdefault(_in(root, module, path), {})[kind] = tensor
    if not found:
        raise PEFTError(f"{path} holds no tensors of HF PEFT's LoRA, such as ….q_proj.lora_A.default.weight.")
    if len(found) > 1:
        raise PEFTError(f"{path} holds several adapters: {listed(found)}. Load it with HF PEFT, and save one of them.")
    if whole := [name for name in state if ".modules_to_save." in name]:
        raise PEFTError(
            f"{path} holds {whole[0]!r}, which was trained whole: a LoRA has no place for it. Load the module with HF "
            "PEFT and call its save_pretrained; what that writes is read here as it is."
        )
    if alpha is None:
        raise PEFTError(f"{path} does not say HF PEFT's lora_alpha, which stands in no tensor: give it by --alpha.")
    ((_, modules),) = found.items()
    _refuse_what_would_be_lost(state, root, path)
    if lost := [name for name, parts in modules.items() if not {"lora_A", "lora_B"} <= parts.keys()]:
        raise PEFTError(f"{path} has no A and B of {lost[0]!r}. It is damaged.")
    ranks = {len(parts["lora_A"]) for parts in modules.values()}
    if len(ranks) > 1:
        raise PEFTError(
            f"{path} has ranks {sorted(ranks)}, and what alpha is for each stands in no tensor. Load the module with "
            "HF PEFT and call its save_pretrained; what that writes is read here as it is."
        )
    factors = {name: (parts["lora_A"], parts["lora_B"]) for name, parts in modules.items()}
    magnitudes = {name: parts["lora_magnitude_vector"] for name, parts in modules.items() if len(parts) == 3}
    return ForeignLoRA(ranks.pop(), alpha, 0.0, factors, magnitudes)


def _in(root: ModelView, name: str, path: Path) -> str:
    """Return what a module is called in the base: the longest ending of its name that there is."""
    found = next((ending for ending in endings(name) if ending in root.modules), None)
    if found is None:
        raise PEFTError(
            f"{path} adapts {name!r}, which this {root.kind} does not have under any ending of that name. Name the "
            "model that the adapter was trained on."
        )
    return found


def _refuse_what_would_be_lost(state: dict[str, Tensor], root: ModelView, path: Path) -> None:
    """Raise :class:`PEFTError` for what was trained beside A and B; warn of what is no part of the base at all."""
    of_base = root.module.state_dict()
    wrapped = tuple(f"{name.removesuffix(_BASE)}." for name in state if name.endswith(_BASE))
    elsewhere = []
    for name, tensor in state.items():
        if _ADAPTER.fullmatch(name):
            continue
        own = next((of_base[end] for end in endings(name.replace(".base_layer.", ".")) if end in of_base), None)
        if own is None and (".lora_" in name or name.startswith(wrapped)):
            said = "is more than the A and B of a layer"
        elif own is not None and not _is_same(own, tensor):
            said = "has other values than the base: it was trained as well, or belongs to another base"
        else:
            elsewhere += [name] if own is None else []
            continue
        raise PEFTError(
            f"{path} holds {name!r}, which {said}. A LoRA has no place for it: load the module with HF PEFT and call "
            "its save_pretrained; what that writes is read here as it is."
        )
    if elsewhere:
        warnings.warn(
            f"{path} also holds {listed(elsewhere)}, which is no part of the base and is not converted.", stacklevel=2
        )


def _is_same(own: Tensor, there: Tensor) -> bool:
    """Whether one is the other, up to the rounding of another dtype."""
    if own.shape != there.shape or own.dtype != there.dtype:
        return own.shape == there.shape and torch.allclose(own.float(), there.float(), rtol=1e-2)
    return torch.equal(own, there)
