"""Tensors of a file that hold several of the model's side by side: names of their pieces.

The piece ``name#0:4:8`` is the rows 4 to 8 of ``name``, ``name#1:0:4`` its first four columns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_peft.errors import PEFTError

_PIECE = re.compile(r"(.+)#([01]):(\d+):(\d+)")


def piece(name: str, dim: int, start: int, stop: int) -> str:
    """Return the name of a piece of the tensor ``name``."""
    return f"{name}#{dim}:{start}:{stop}"


def whole_of(name: str) -> str:
    """Return the name of the tensor that the file has: of a piece, the one that it is a piece of."""
    found = _PIECE.fullmatch(name)
    return name if found is None else found[1]


def take(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Return a tensor of a file, or a piece of one.

    Raises:
        KeyError: The file has no such tensor.
        PEFTError: It is too small.
    """
    found = _PIECE.fullmatch(name)
    if found is None:
        return tensors[name]
    tensor, dim, start, stop = tensors[found[1]], int(found[2]), int(found[3]), int(found[4])
    if tensor.dim() != 2 or not start <= stop <= tensor.shape[dim]:
        raise PEFTError(
            f"{found[1]} has the shape {list(tensor.shape)}; {start} to {stop} of dimension {dim} were to be read. "
            "The file is damaged; take another copy."
        )
    return tensor.narrow(dim, start, stop - start)


def joined(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what a file is to hold: pieces put together, in their order."""
    pieces: dict[tuple[str, int], list[tuple[int, Tensor]]] = {}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _PIECE.fullmatch(name)
        if match is None:
            found[name] = tensor
        else:
            pieces.setdefault((match[1], int(match[2])), []).append((int(match[3]), tensor))
    for (name, dim), parts in pieces.items():
        found[name] = torch.cat([tensor for _, tensor in sorted(parts, key=lambda part: part[0])], dim=dim)
    return found
