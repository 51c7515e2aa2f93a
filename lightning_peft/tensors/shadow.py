"""Weights that a module reads instead of its own, for a while.

A tensor in a module's ``__dict__`` is found before the parameter of that name: the module reads it, while its
parameters, their names and its state dict are what they are.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_peft.errors import PEFTError
from lightning_peft.tensors.sharding import in_flat_pieces

Shadows = list[tuple[nn.Module, str, Tensor | None]]
"""The owner of each replaced parameter, its name there, and the tensor that was in its place already."""


def read(module: nn.Module, name: str) -> Tensor:
    """Return the parameter ``name`` of ``module`` (``out_proj.weight``), or what wrappers have put in its place.

    Raises:
        PEFTError: It is in pieces.
    """
    owner, leaf = _owner(module, name)
    tensor: Tensor = getattr(owner, leaf)
    if isinstance(tensor, DTensor) or in_flat_pieces(tensor):
        raise PEFTError(
            f"{name!r} of a {type(module).__name__} is in pieces while the module runs, as under ZeRO-3 or tensor "
            "parallelism, so it cannot be adapted. Exclude it, or take another base strategy."
        )
    return tensor


def shadow(module: nn.Module, tensors: Mapping[str, Tensor]) -> Shadows:
    """Let ``module`` read ``tensors`` instead of its parameters of these names, until :func:`unshadow`."""
    shadows: Shadows = []
    for name, tensor in tensors.items():
        owner, leaf = _owner(module, name)
        shadows.append((owner, leaf, owner.__dict__.get(leaf)))
        owner.__dict__[leaf] = tensor
    return shadows


def unshadow(shadows: Shadows) -> None:
    """Undo what :func:`shadow` returned, and empty it."""
    while shadows:
        owner, leaf, before = shadows.pop()
        # FSDP1 keeps the tensor of a gathered parameter in the same place.
        if before is None:
            del owner.__dict__[leaf]
        else:
            owner.__dict__[leaf] = before


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf
