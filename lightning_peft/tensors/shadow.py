"""Weights that a module reads instead of its own, for a while.

A tensor in a module's ``__dict__`` is found before the parameter of that name: the module reads it, while its
parameters, their names and its state dict are what they are.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_peft.errors import PEFTError
from lightning_peft.tensors.sharding import in_flat_pieces

_LONGEST_WAIT = 60.0

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
    owners = [_owner(module, name) for name in tensors]
    shadows: Shadows = [(owner, leaf, owner.__dict__.get(leaf)) for owner, leaf in owners]
    for (owner, leaf, _), tensor in zip(shadows, tensors.values(), strict=True):
        owner.__dict__[leaf] = tensor
    return shadows


def unshadow(shadows: Shadows) -> None:
    """Undo what :func:`shadow` returned, and empty it."""
    while shadows:
        owner, leaf, before = shadows.pop()
        # FSDP1 keeps the tensor of a gathered parameter in the same place.
        if before is None:
            owner.__dict__.pop(leaf, None)
        else:
            owner.__dict__[leaf] = before


class Turn:
    """The turn of one thread to run a module that reads replaced weights, since all threads would read them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: int | None = None
        self._shadows: Shadows = []

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def begin(self) -> None:
        """Wait until no other thread runs the module.

        Raises:
            PEFTError: One has not returned for a minute.
        """
        # A program of torch.compile writes nothing to the module: what it reads is the tensor itself.
        if torch.compiler.is_compiling():
            return
        if self._thread == threading.get_ident():
            # An interrupt ended this thread's last call, of which torch tells no hook.
            unshadow(self._shadows)
        elif not self._lock.acquire(timeout=_LONGEST_WAIT):
            raise PEFTError(
                "A module whose adapter replaces weights of its own (attention, experts) runs in one thread at a time, "
                f"and another one has been in it for {_LONGEST_WAIT} s, or was interrupted there. If it was, call the "
                "model once more in that thread."
            )
        self._thread = threading.get_ident()

    def shadow(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Let ``module`` read ``tensors`` instead of its parameters of these names, until :meth:`end`."""
        self._shadows = shadow(module, tensors)

    def end(self) -> None:
        """Undo :meth:`shadow`, and let the next thread run the module, if this one has its turn."""
        if torch.compiler.is_compiling():
            unshadow(self._shadows)
        elif self._thread == threading.get_ident():
            unshadow(self._shadows)
            self._thread = None
            self._lock.release()


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf
