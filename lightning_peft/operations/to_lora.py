"""Any change of weights as a LoRA: the nearest of its rank, by singular values, with what that loses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_peft.core.adapter import Adapter
from lightning_peft.core.refusals import refuse_merged
from lightning_peft.core.registry import required, trained_whole
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError, listed
from lightning_peft.operations.combine import lora_with, set_factors
from lightning_peft.operations.eject import eject
from lightning_peft.operations.inject import inject
from lightning_peft.operations.mergeable import can_merge
from lightning_peft.tensors.weights import as_matrix, is_linear, read_matrix, weight_of

_Made = dict[str, tuple[Tensor, Tensor, float]]
"""A, B and what they lose, by the module's name."""


@dataclass(frozen=True)
class ToLoRAReport:
    """What became a LoRA. A loss is the norm of what its rank has no room for, divided by the norm of the change."""

    ranks: Mapping[str, int]
    """By the module's name."""
    losses: Mapping[str, float]
    left: tuple[str, ...]
    """Names of what has changed and is no weight of a linear layer or an embedding: it is not in the LoRA."""

    def __str__(self) -> str:
        worst = max(self.losses, key=lambda name: self.losses[name])
        mean = sum(self.losses.values()) / len(self.losses)
        text = (
            f"{len(self.ranks)} modules, of ranks {min(self.ranks.values())} to {max(self.ranks.values())}; lost are "
            f"{mean:.2%} of a module's change on average, {self.losses[worst]:.2%} at most ({worst})."
        )
        return text + (f" Left out, since a LoRA changes weights alone: {listed(self.left)}." if self.left else "")


@torch.no_grad()
def to_lora(model: nn.Module, *, rank: int | None = None, energy: float | None = None) -> ToLoRAReport:
    """Put a LoRA in the place of the active adapter: of all of its rank the one whose change is nearest.

    Args:
        model: A model with an adapter that could be merged, of any method. It is on one device, and not merged.
        rank: The LoRA's rank; smaller where a module has no room for it.
        energy: Or which part of the sum of squares of a change each module is to keep, from which follow its rank.

    Raises:
        PEFTError: The adapter is no change of weights alone, or the arguments do not fit. Nothing has changed.
    """
    _check(rank, energy)
    view = ModelView(model)
    required(view)
    refuse_merged(view, "make a LoRA of an adapter")
    if own := [name for name, tensor, before in trained_whole(view) if not torch.equal(tensor.cpu(), before.cpu())]:
        raise PEFTError(
            f"{own[0]!r} is trained whole, for which a LoRA has no place. Write a whole model with merge instead, or "
            "make a LoRA of the difference of that model and its base."
        )
    changes, left = dict[str, Tensor](), list[str]()
    for name, host, slot in view.slots:
        if (adapter := slot.active_adapter) is None:
            continue
        changes[name], bias = change_of_weight(name, host, adapter)
        left += [f"{name}.bias"] if bias else []
    made = _made(changes, rank, energy)
    eject(model)
    return _injected(model, made, left)


@torch.no_grad()
def difference_to_lora(
    model: nn.Module, tuned: nn.Module, *, rank: int | None = None, energy: float | None = None
) -> ToLoRAReport:
    """Give ``model`` a LoRA that makes of it, as nearly as its rank allows, a ``tuned`` copy of it.

    Args:
        model: The base model, without adapters.
        tuned: A model of the same form with other weights.
        rank: As for :func:`to_lora`.
        energy: As for :func:`to_lora`.

    Raises:
        PEFTError: The models have other forms or the same weights, or the arguments do not fit.
    """
    _check(rank, energy)
    base, other = ModelView(model), ModelView(tuned)
    shapes, others = ({name: p.shape for name, p in view.parameters.items()} for view in (base, other))
    if shapes != others:
        name = next(name for name in {**shapes, **others} if shapes.get(name) != others.get(name))
        raise PEFTError(f"The two models differ in the form of {name!r}: only models of one form have a difference.")
    modules, changes, left = other.modules, dict[str, Tensor](), list[str]()
    for name, parameter in base.parameters.items():
        owner, _, leaf = name.rpartition(".")
        if torch.equal(parameter, other.parameters[name]):
            continue
        if leaf == "weight" and _has_room(base.modules[owner]):
            changes[owner] = read_matrix(modules[owner]) - read_matrix(base.modules[owner])
        else:
            left.append(name)
    return _injected(model, _made(changes, rank, energy), left)


def nearest(change: Tensor, rank: int | None, energy: float | None) -> tuple[Tensor, Tensor, float]:
    """Return A ``[r, in]`` and B ``[out, r]`` whose product is nearest to ``change``, and what part of it is lost."""
    wide = change.double()
    squares, vectors = torch.linalg.eigh(wide @ wide.T if len(wide) <= wide.shape[1] else wide.T @ wide)
    squares, vectors = squares.flip(0).clamp(min=0), vectors.flip(1)
    kept = squares.cumsum(0) / squares.sum().clamp(min=torch.finfo(squares.dtype).tiny)
    r = int((kept < energy).sum()) + 1 if energy is not None else int(rank or 1)
    r = min(r, len(squares))
    some = vectors[:, :r]
    a, b = (some.T @ wide, some) if len(wide) <= wide.shape[1] else (some.T, wide @ some)
    norm = torch.linalg.vector_norm(wide)
    lost = float(torch.linalg.vector_norm(wide - b @ a) / norm) if norm else 0.0
    return a.to(change.dtype), b.to(change.dtype), lost


def _check(rank: int | None, energy: float | None) -> None:
    ranked = isinstance(rank, int) and rank >= 1 and energy is None
    if not (ranked or (rank is None and isinstance(energy, int | float) and 0 < energy < 1)):
        raise PEFTError(
            f"rank={rank!r} and energy={energy!r} were given; either a rank of at least 1, or an energy between 0 "
            "and 1, such as 0.99, was expected."
        )


def _has_room(module: nn.Module) -> bool:
    return is_linear(module) or isinstance(module, nn.Embedding)


class _Fold(nn.Module):
    """An adapter's `fold` as a forward pass, which torch can run with other tensors in the place of the adapter's."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the weight and the bias that make the adapter superfluous."""
        return self.adapter.fold(weight, bias)


def change_of_weight(
    name: str, host: nn.Module, adapter: Adapter, dtype: torch.dtype | None = None
) -> tuple[Tensor, bool]:
    """Return the change of the weight ``[out, in]``, and whether the bias changes too.

    Args:
        name: The module's name.
        host: The module.
        adapter: Its adapter.
        dtype: What to compute in, the adapter's own tensors too; in at least float32 by default, where a change of
            rank r has others of a ten-millionth beside its r singular values.

    Raises:
        PEFTError: The adapter is no change of the weight of a linear layer or an embedding.
    """
    if adapter.replaces:
        raise PEFTError(
            f"The {type(adapter).__name__} of {name!r} changes weights that the module reads itself, for which a LoRA "
            "of layers has no place. Where these are experts, `lightning-peft export --experts mixtral` (or qwen) "
            "writes a LoRA for each of them."
        )
    if not can_merge(host, adapter) or not _has_room(host):
        raise PEFTError(
            f"The {type(adapter).__name__} of {name!r} is no change of the weight of a linear layer or an embedding, "
            "so no LoRA comes near it."
        )
    before = as_matrix(host, weight_of(host)).to(dtype)
    own, fold = host._parameters.get("bias"), _Fold(adapter)
    tensors: dict[str, Tensor] = {
        n: nn.Parameter(p.detach().to(dtype), requires_grad=False) for n, p in fold.named_parameters()
    }
    tensors |= {n: b.to(dtype) for n, b in fold.named_buffers() if b.is_floating_point()}
    after, bias = functional_call(fold, tensors, (before.clone(), own))
    same = bias is None or (own is not None and torch.equal(bias.to(own), own))
    return after - before, not same


def _made(changes: Mapping[str, Tensor], rank: int | None, energy: float | None) -> _Made:
    """Return the factors of each change, and what they lose."""
    if not changes:
        raise PEFTError("No weight of a linear layer or an embedding has changed: there is nothing to make a LoRA of.")
    if bad := [name for name, change in changes.items() if not math.isfinite(change.abs().max())]:
        raise PEFTError(f"The change of {bad[0]!r} holds NaN or infinity. Take an earlier checkpoint.")
    return {name: nearest(change, rank, energy) for name, change in changes.items()}


def _injected(model: nn.Module, made: _Made, left: list[str]) -> ToLoRAReport:
    factors = {name: (a, b) for name, (a, b, _) in made.items()}
    inject(model, lora_with(factors, ModelView(model)))
    set_factors(model, "default", factors)
    ranks = {name: len(a) for name, (a, _) in factors.items()}
    return ToLoRAReport(ranks, {name: loss for name, (_, _, loss) in made.items()}, tuple(left))
