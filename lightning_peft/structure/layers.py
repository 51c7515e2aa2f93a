"""The lists of repeated blocks in a model, which ``layers`` counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from lightning_peft.core.view import ModelView, once
from lightning_peft.errors import PEFTError
from lightning_peft.structure.inner_models import transformers_models


@once
def listed_blocks(model: ModelView) -> Mapping[str, tuple[str, int]]:
    """Map each module inside a list of repeated blocks to ``(name of the outermost list, index of the block)``."""
    found: dict[str, tuple[str, int]] = {}
    roots = transformers_models(model)
    for name in model.modules:
        parent, _, leaf = name.rpartition(".")
        if parent in found:
            found[name] = found[parent]
        # A list that holds whole models is no list of blocks.
        elif leaf.isdigit() and name not in roots and isinstance(model.modules[parent], nn.ModuleList | nn.Sequential):
            found[name] = (parent, int(leaf))
    return found


def in_layers(model: ModelView, names: Iterable[str], layers: str | Sequence[int] | None) -> list[str]:
    """Return those of ``names``, of modules or their parameters, in the blocks that ``layers`` names; all, if ``None``.

    Raises:
        PEFTError: There is no such layer.
    """
    wanted = None if layers is None else _in_layers(listed_blocks(model), layers)
    owners = ((name, name if name in model.modules else name.rpartition(".")[0]) for name in names)
    return [name for name, owner in owners if wanted is None or owner in wanted]


def _in_layers(blocks: Mapping[str, tuple[str, int]], layers: str | Sequence[int]) -> set[str]:
    if not blocks:
        raise PEFTError(f"layers={layers!r} was given, but the model has no list of blocks. Drop it.")
    counts: dict[str, int] = {}
    for parent, index in blocks.values():
        counts[parent] = max(counts.get(parent, 0), index + 1)
    wanted = {parent: _indices(layers, count) for parent, count in counts.items()}
    if not isinstance(layers, str):
        missing = sorted({index for index in layers if not any(index in chosen for chosen in wanted.values())})
        if missing:
            raise PEFTError(f"layers={list(layers)!r}: there is no layer {missing}. Layers there are: {counts}.")
    if not any(wanted.values()):
        raise PEFTError(f"layers={layers!r} selects no layer. Layers there are: {counts}.")
    return {name for name, (parent, index) in blocks.items() if index in wanted[parent]}


def _indices(layers: str | Sequence[int], count: int) -> set[int]:
    if not isinstance(layers, str):
        return {index for index in layers if 0 <= index < count}
    bounds = layers.split(":")
    try:
        numbers = [int(bound) if bound.strip() else None for bound in bounds]
    except ValueError:
        numbers = []
    if not 2 <= len(numbers) <= 3:
        raise PEFTError(f"layers={layers!r} is no slice. Write a list of indices, or a slice such as '8:16' or '-4:'.")
    return set(range(count)[slice(*numbers)])
