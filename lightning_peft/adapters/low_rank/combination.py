"""The low-rank changes of one module by several adapters, made into one.

TIES: TIES-Merging: Resolving Interference When Merging Models (Yadav et al., 2023), arXiv:2306.01708, section 4.
DARE: Language Models are Super Mario (Yu et al., 2023), arXiv:2311.03099, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

How = Literal[
    "cat",
    "svd",
    "linear",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]


@dataclass(frozen=True)
class Term:
    """weight · scale · B A; A ``[r, in]``, B ``[out, r]``."""

    a: Tensor
    b: Tensor
    scale: float
    weight: float


def combined(
    terms: Sequence[Term], how: How, rank: int, density: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return A ``[rank, in]`` and B ``[out, rank]`` of the combination, whose scale is 1.

    Args:
        terms: What is combined.
        how: As for :func:`lightning_peft.operations.combine`.
        rank: The rank of the result, for ``svd`` and what ends in it; others have one of their own.
        density: The part of the elements that is kept, for rules that drop some.
        generator: What the dropped elements of DARE are drawn from.
    """
    if how in ("cat", "svd"):
        a = torch.cat([term.weight * term.scale * term.a for term in terms])
        b = torch.cat([term.b for term in terms], dim=1)
        if how == "cat" and len(a) <= min(a.shape[1], len(b)):
            return a, b
        # The same product with fewer columns: A and B have more than its rank can be.
        return _truncated(*_svd_of_product(b, a), rank if how == "svd" else min(a.shape[1], len(b)))
    rule = how.removesuffix("_svd")
    weights = [term.weight for term in terms]
    if rule != how:
        change = _merged([term.scale * (term.b @ term.a) for term in terms], weights, rule, density, generator)
        u, values, v = torch.linalg.svd(change, full_matrices=False)
        return _truncated(u, values, v, rank)
    roots = [math.sqrt(abs(term.weight * term.scale)) for term in terms]
    signed = [math.copysign(root, weight) for root, weight in zip(roots, weights, strict=True)]
    a = _merged([term.a for term in terms], signed, rule, density, generator)
    return a, _merged([term.b for term in terms], roots, rule, density, generator)


def _merged(
    tensors: Sequence[Tensor], weights: Sequence[float], rule: str, density: float, generator: torch.Generator
) -> Tensor:
    """Return the weighted sum of what ``rule`` keeps of ``tensors``; for TIES, the mean of the elements that agree."""
    if rule.startswith("dare"):
        tensors = [_dropped(tensor, density, generator) for tensor in tensors]
    elif rule != "linear":
        tensors = [_trimmed(tensor, density) for tensor in tensors]
    stacked = torch.stack(list(tensors))
    weighted = stacked * stacked.new_tensor(weights)[:, None, None]
    if not rule.endswith("ties"):
        return weighted.sum(0)
    elected = torch.where(stacked.sum(0) >= 0, 1, -1)
    agreeing = stacked.sign() == elected
    return (weighted * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)


def _trimmed(tensor: Tensor, density: float) -> Tensor:
    """Keep the largest elements."""
    flat = tensor.flatten()
    largest = flat.abs().topk(int(density * len(flat))).indices
    return torch.zeros_like(flat).index_copy(0, largest, flat[largest]).view_as(tensor)


def _dropped(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Keep elements at random, enlarged so that the expected value stays."""
    kept = torch.bernoulli(torch.full(tensor.shape, density), generator=generator)
    return tensor * kept.to(tensor) / density


def _svd_of_product(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the SVD of ``left right``, thin matrices, without forming it."""
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, values, v = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return q_left @ u, values, v @ q_right.T


def _truncated(u: Tensor, values: Tensor, v: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A and B of the largest ``rank`` singular values, all of them in B."""
    missing = max(rank - len(values), 0)
    a, b = v[:rank], u[:, :rank] * values[:rank]
    return functional.pad(a, (0, 0, 0, missing)), functional.pad(b, (0, missing))
