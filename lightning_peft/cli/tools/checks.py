"""The commands ``verify`` and ``diff``: whether an adapter belongs to a base, and how two adapters differ."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lightning_peft.cli.tools.inspect import base_name, model_class
from lightning_peft.cli.tools.merge import mapped
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError, listed
from lightning_peft.files.contents import read_tensors
from lightning_peft.files.manifest import check_manifest
from lightning_peft.formats.configuration import read_config, read_marker
from lightning_peft.formats.content import TENSOR_FILE
from lightning_peft.formats.serving import serving_copy
from lightning_peft.storage.loading import load_adapter
from lightning_peft.storage.saving import FILES
from lightning_peft.tasks.pretrained import load_model


def verify(adapter: str, model: str | None = None) -> None:
    """Check that an adapter is whole and belongs to a base model.

    Every file is as it was written, its tensors are those that its configuration speaks of, they have the base's
    shapes and no NaN, and the base's weights are those that it was trained on, as far as the adapter records them.

    Args:
        adapter: The adapter directory, of this package or of Hugging Face PEFT.
        model: The base model: a directory, a name on the Hugging Face hub, or package:NAME. The one that the adapter
            names, if not given.

    Raises:
        PEFTError: The first of these that does not hold.
    """
    model = model or base_name(Path(adapter))
    kind = model_class(Path(adapter), model)
    base = mapped(model, kind) or load_model(model, kind)
    load_adapter(base, adapter)
    slots = ModelView(base).slots
    kinds = sorted({type(slot.active_adapter).__name__ for _, _, slot in slots})
    records = bool(read_marker(Path(adapter)).get("base", {}).get("samples"))
    compared = (
        "The weights are those that it was trained on."
        if records
        else "It records no weights of its base, so names and shapes alone were compared."
    )
    print(f"{adapter} fits {model}: {len(slots)} modules ({', '.join(kinds)}). {compared}")


def diff(first: str, second: str) -> None:
    """Show how two adapters differ: in hyper-parameters, in modules, and in what they make of each weight.

    Of plain LoRA it is the change s · B A that is compared, whatever its factors, rank and scale; of other methods each
    tensor.

    Args:
        first: An adapter directory, of this package or of Hugging Face PEFT.
        second: Another one.

    Raises:
        PEFTError: One of them is none, or damaged.
    """
    configs, tensors = [], []
    for path in (Path(first), Path(second)):
        check_manifest(path, FILES)
        configs.append(read_config(path))
        tensors.append(read_tensors(path / TENSOR_FILE))
    for key in sorted(configs[0].keys() | configs[1].keys()):
        mine, theirs = (config.get(key) for config in configs)
        if mine != theirs:
            print(f"{key}: {mine!r} -> {theirs!r}")
    try:
        copies = [serving_copy(*given) for given in zip(configs, tensors, (first, second), strict=True)]
    except PEFTError:
        _show("tensors", tensors[0], tensors[1])
    else:
        _show("changes of weights", *(_changes(copied) for _, copied in copies))


def _changes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return B A of each module of a serving copy, whose scale is in B."""
    found = {}
    for name, a in tensors.items():
        if "lora_A" in name or "lora_embedding_A" in name:
            b = tensors[name.replace("_A", "_B")]
            found[name.partition(".lora_")[0].removeprefix("base_model.model.")] = b.float() @ a.float()
    return found


def _show(what: str, mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    for side, names in (("first", mine.keys() - theirs.keys()), ("second", theirs.keys() - mine.keys())):
        if names:
            print(f"in the {side} alone: {listed(sorted(names))}")
    shared = [name for name in mine if name in theirs]
    if reshaped := [name for name in shared if mine[name].shape != theirs[name].shape]:
        print(f"of other shapes: {listed(reshaped)}")
    distances = {name: _distance(mine[name], theirs[name]) for name in shared if name not in reshaped}
    if distances:
        worst = max(distances, key=lambda name: distances[name])
        mean = sum(distances.values()) / len(distances)
        most = f"by {distances[worst]:.3%} at most ({worst})"
        print(f"{len(distances)} {what}: they differ by {mean:.3%} of their norm on average, {most}.")


def _distance(mine: Tensor, theirs: Tensor) -> float:
    """Return the distance of two tensors, relative to the larger."""
    norm = max(float(torch.linalg.vector_norm(tensor.float())) for tensor in (mine, theirs))
    return float(torch.linalg.vector_norm(mine.float() - theirs.float())) / norm if norm else 0.0
