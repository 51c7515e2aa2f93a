"""LoRA of LitGPT, as `litgpt/lora.py` of release 0.5.13 has it, of models that transformers lays out as Llama's.

Query, key and value are one layer there. Its A has r rows for each of them that is adapted, and its B their rows one
part after another, whatever the layout of the weight: that is a LoRA for each of transformers' three layers.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_peft.core.schema import check_values
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.files.contents import read_torch
from lightning_peft.formats.foreign.low_rank import ForeignLoRA
from lightning_peft.tensors.weights import features

_TENSORS, _CONFIG = "lit_model.pth.lora", "hyperparameters.yaml"
_LAYERS = {
    "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}
"""Names of layers in a block, with transformers' names."""
_FUSED = ("attn.qkv", "attn.attn")
"""Query, key and value: today, and in older releases."""
_PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
_HEAD = "lm_head"

_SAID = re.compile(r"^(lora_\w+): *(\S+) *$", flags=re.MULTILINE)
_TYPES = {"lora_r": int, "lora_alpha": float, "lora_dropout": float}

_Factors = dict[str, tuple[Tensor, Tensor]]


def read_litgpt(path: Path, root: ModelView) -> ForeignLoRA:
    """Read a directory of LitGPT's.

    Raises:
        PEFTError: It is damaged, or of a model with other layers.
    """
    directory = path if path.is_dir() else path.parent
    said = _hyper_parameters(directory / _CONFIG)
    tensors = read_torch(directory / _TENSORS, "model")
    parts = [part for part in _PROJECTIONS if said.get(f"lora_{part}", part != "key")]
    factors: _Factors = {}
    for name in [name for name in tensors if name.endswith(".lora_A")]:
        layer = name.removesuffix(".lora_A")
        a, b = tensors.pop(name), tensors.pop(f"{layer}.lora_B", None)
        if b is None:
            raise PEFTError(f"{directory / _TENSORS} lacks {layer}.lora_B. It is damaged.")
        factors |= _factors(layer, a, b, parts, root, str(directory))
    if tensors:
        raise PEFTError(f"{directory / _TENSORS} holds {min(tensors)!r}, which is no part of a LoRA. It is damaged.")
    return ForeignLoRA(said["lora_r"], said["lora_alpha"], said.get("lora_dropout", 0.0), factors, {})


def _hyper_parameters(file: Path) -> dict[str, Any]:
    """Return what a run's configuration says of LoRA; of YAML these lines alone are looked at."""
    if not file.is_file():
        raise PEFTError(f"{file} is not there, which says rank and scale. Name the directory that LitGPT has written.")
    try:
        said = {key: json.loads(value) for key, value in _SAID.findall(file.read_text(encoding="utf-8"))}
    except ValueError as error:
        raise PEFTError(f"{file} has other values of LoRA than numbers and switches: {error}.") from error
    check_values(said, _TYPES, str(file))
    if missing := {"lora_r", "lora_alpha"} - said.keys():
        raise PEFTError(f"{file} does not say {min(missing)}. It is damaged.")
    return said


def _factors(layer: str, a: Tensor, b: Tensor, parts: list[str], root: ModelView, source: str) -> _Factors:
    """Return A and B of the layers that ``layer`` is to transformers."""
    if layer == _HEAD:
        # The vocabulary is filled up there; what is added has no rows here.
        return {_HEAD: (a, b[: features(root.modules[_HEAD])[1]] if _HEAD in root.modules else b)}
    found = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", layer)
    block, inner = (f"model.layers.{found[1]}", found[2]) if found else ("", "")
    if inner in _LAYERS:
        return {f"{block}.{_LAYERS[inner]}": (a, b)}
    if inner not in _FUSED:
        raise PEFTError(
            f"{source} adapts {layer!r}, and which layers of transformers' that is, is known for models like Llama "
            "alone. Merge it with litgpt merge_lora, and convert the model."
        )
    names = [f"{block}.self_attn.{_PROJECTIONS[part]}" for part in parts]
    sizes = [features(root.modules[name])[1] if name in root.modules else 0 for name in names]
    if 0 in sizes or sum(sizes) != len(b) or not names or len(a) % len(names):
        raise PEFTError(
            f"{source}: {layer!r} has {len(a)} rows of A and {len(b)} of B; for {', '.join(names) or 'no projection'} "
            f"of this {root.kind}, of {sizes} outputs, others were expected. Name the model that it was trained on."
        )
    return dict(zip(names, zip(a.chunk(len(names)), b.split(sizes), strict=True), strict=True))
