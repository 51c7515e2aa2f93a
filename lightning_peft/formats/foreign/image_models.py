"""LoRA of image models: of kohya's scripts, and of diffusers, as `loaders/lora_base.py` of release 0.42.1 writes it.

A file holds what was trained of several models: of a UNet or a transformer, and of one or two text encoders. What is
for the base that is given is read; what is for the others is told. Kohya's names are those of modules with every dot as
an underscore: the base tells where there was a dot.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_peft.core.schema import check_values
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError, listed
from lightning_peft.files.contents import open_tensors, read_tensors
from lightning_peft.formats.counterparts.lora import number_for
from lightning_peft.formats.foreign.low_rank import ForeignLoRA

_KOHYA = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}
_DIFFUSERS = ("unet", "transformer", "text_encoder", "text_encoder_2")
_ENCODERS = ("text_encoder", "text_encoder_2")

_PARTS = {
    **{"lora_down.weight": "A", "lora_up.weight": "B", "alpha": "alpha"},
    **{"lora_A.weight": "A", "lora_B.weight": "B", "lora.down.weight": "A", "lora.up.weight": "B"},
    **{"lora_linear_layer.down.weight": "A", "lora_linear_layer.up.weight": "B"},
}
"""What a tensor's name ends in, after a dot, and what it is."""

_Parts = dict[str, Tensor]


def read_kohya(path: Path, root: ModelView) -> ForeignLoRA:
    """Read a file of kohya's scripts, or a directory with one.

    Raises:
        PEFTError: It is no plain LoRA, is damaged, or does not say which of the base's modules it is for.
    """
    file = _file(path)
    flat: dict[str, list[str]] = {}
    for name in root.modules:
        flat.setdefault(name.replace(".", "_"), []).append(name)
    modules: dict[str, dict[str, _Parts]] = {}
    for name, parts in _by_module(read_tensors(file), file).items():
        lead = next((lead for lead in _KOHYA if name.startswith(lead)), None)
        if lead is None:
            raise PEFTError(f"{file} adapts {name!r}; kohya's names begin with {', '.join(_KOHYA)}. It is damaged.")
        modules.setdefault(_KOHYA[lead], {})[name.removeprefix(lead)] = parts
    found = {}
    for name, parts in _of_base(modules, root, file).items():
        meant = flat.get(name) or flat.get(name.removeprefix("text_model_"), [])
        if len(meant) != 1:
            which = f"could be {listed(map(repr, meant))} of" if meant else "is none in"
            hint = "" if meant else _sgm(name)
            raise PEFTError(f"{file} adapts {name!r}, which {which} this {root.kind}. {hint}{_ON_WHAT}")
        found[meant[0]] = parts
    return _lora(found, {}, file)


def read_diffusers(path: Path, root: ModelView) -> ForeignLoRA:
    """Read what a pipeline's ``save_lora_weights``, or a model's ``save_lora_adapter``, has written.

    Raises:
        PEFTError: It is no plain LoRA, is damaged, or not for the base.
    """
    file = _file(path)
    modules: dict[str, dict[str, _Parts]] = {}
    for name, parts in _by_module(read_tensors(file), file).items():
        lead, _, rest = name.partition(".")
        part, own = (lead, rest) if lead in _DIFFUSERS and name not in root.modules else ("", name)
        modules.setdefault(part, {})[own] = parts
        if own not in root.modules and own.removeprefix("text_model.") in root.modules:
            modules[part][own.removeprefix("text_model.")] = modules[part].pop(own)
    part, said = _part(modules, root), _said(file)
    lead = f"{part}." if part else ""
    own_said = {key.removeprefix(lead): value for key, value in said.items() if key.startswith(lead)}
    return _lora(_of_base(modules, root, file), own_said, file)


_ON_WHAT = "Name the model that it was trained on."


def _sgm(name: str) -> str:
    if not name.startswith(("input_blocks", "middle_block", "output_blocks")):
        return ""
    return (
        "These are names of Stable Diffusion's own UNet: load the file in diffusers with pipeline.load_lora_weights, "
        "write it with pipeline.unet.save_lora_adapter(DIR), and convert that. "
    )


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise PEFTError(f"{path} has {len(files)} files of tensors; name the one to read.")
    return files[0]


def _by_module(tensors: Mapping[str, Tensor], file: Path) -> dict[str, _Parts]:
    """Return A, B and alpha of each module, by what the file calls it."""
    found: dict[str, _Parts] = {}
    for name, tensor in tensors.items():
        ending = next((ending for ending in _PARTS if name.endswith(f".{ending}")), None)
        if ending is None:
            raise PEFTError(
                f"{file} holds {name!r}, which is none of a plain LoRA (DoRA's, LyCORIS's and trained norms are not "
                "read from such files). Load it in the tool that wrote it, and save the model with the change in it."
            )
        found.setdefault(name.removesuffix(f".{ending}"), {})[_PARTS[ending]] = tensor
    if lost := [name for name, parts in found.items() if not {"A", "B"} <= parts.keys()]:
        raise PEFTError(f"{file} has no A and B of {lost[0]!r}. It is damaged.")
    return found


def _part(modules: Iterable[str], root: ModelView) -> str:
    """Return which part of a pipeline the base is, as far as its configuration tells."""
    parts = list(modules)
    kind = str(getattr(getattr(root.module, "config", None), "model_type", ""))
    encoders = [part for part in parts if part in _ENCODERS]
    if "clip" in kind or "t5" in kind:
        second = "text_encoder_2" in encoders and "WithProjection" in root.kind
        return "text_encoder_2" if second else next(iter(encoders), "")
    return next((part for part in parts if part not in _ENCODERS), "")


def _of_base(modules: Mapping[str, dict[str, _Parts]], root: ModelView, file: Path) -> dict[str, _Parts]:
    """Return what is for the base; what is for others is told."""
    part = _part(modules, root)
    if part not in modules:
        raise PEFTError(f"{file} is for {listed(modules)}, and none of it for this {root.kind}. {_ON_WHAT}")
    if others := [other for other in modules if other != part]:
        warnings.warn(
            f"{file} is also for {listed(others)}, which are models of their own: convert it once more for each.",
            stacklevel=2,
        )
    return modules[part]


def _said(file: Path) -> dict[str, Any]:
    """Return the configuration that newer releases of diffusers write into the file's header."""
    with open_tensors(file) as opened:
        text = (opened.metadata() or {}).get("lora_adapter_metadata")
    try:
        said = json.loads(text) if text else {}
    except ValueError as error:
        raise PEFTError(f"{file} has a damaged header: {error}.") from error
    return said if isinstance(said, dict) else {}


def _lora(modules: Mapping[str, _Parts], said: Mapping[str, Any], file: Path) -> ForeignLoRA:
    """Return the LoRA of ``modules``; without a word on it, alpha is the rank."""
    check_values(said, {"lora_alpha": float, "lora_dropout": float, "use_rslora": bool, "use_dora": bool}, str(file))
    if odd := [key for key in ("use_rslora", "use_dora", "lora_bias") if said.get(key)]:
        raise PEFTError(f"{file} says {odd[0]}, which is not read from such files. Save it with HF PEFT instead.")
    ranks = {name: len(parts["A"]) for name, parts in modules.items()}
    alphas: dict[str, float] = {}
    for name, parts in modules.items():
        stored = parts.get("alpha")
        if stored is not None and stored.numel() != 1:
            raise PEFTError(f"{file}: alpha of {name!r} has the shape {list(stored.shape)}; one number was expected.")
        alphas[name] = float(stored) if stored is not None else float(_alpha(said, name, ranks[name], file))
    r = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    factors = {name: (parts["A"], parts["B"]) for name, parts in modules.items()}
    return ForeignLoRA(r, alpha, float(said.get("lora_dropout") or 0.0), factors, {}, alphas)


def _alpha(said: Mapping[str, Any], name: str, rank: int, file: Path) -> Any:
    return number_for(said, "alpha_pattern", "lora_alpha", name, str(file)) if said.get("lora_alpha") else rank
