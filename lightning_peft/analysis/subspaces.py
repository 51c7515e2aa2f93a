"""How much the directions of two low-rank changes have in common (LoRA, arXiv:2106.09685, section 7.2, appendix G)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_peft.analysis.changes import WeightChange
from lightning_peft.errors import PEFTError

Basis = Literal["A", "right", "left"]
"""Whose directions: A's, as in the paper; or ΔW's right ones (in what the layer is given), or left ones (in what it
gives), which are ordered by what they contribute."""

_ALIKE = 0.5
"""Cosine of two matrices above which chance does not explain it: of independent ones it is about 1 / √(r · in)."""


def directions(change: WeightChange, basis: Basis = "right") -> Tensor:
    """Return orthonormal directions ``[d, k]`` of a change, the strongest first, float64.

    Args:
        change: The change.
        basis: ``A`` (d is the number of input features), ``right`` (the same) or ``left`` (output features).

    Raises:
        PEFTError: There is no such basis, or the change has no A.
    """
    if basis not in get_args(Basis):
        raise PEFTError(f"basis={basis!r} was given; it is 'A', 'right' or 'left'.")
    if basis == "A":
        if change.lora_A is None:
            raise PEFTError("basis='A' was given, and this change is no LoRA's: take 'right' or 'left'.")
        rows: Tensor = torch.linalg.svd(change.lora_A.double(), full_matrices=False)[2]
        return rows.T
    left, _, right = change.singular
    return (right if basis == "right" else left)[:, : change.rank]


def subspace_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Return φ(i, j) = ‖U₁ᵢᵀ U₂ⱼ‖² / min(i, j) of all leading columns (equation 4).

    It is 1 where the one space lies in the other, and 0 where they are orthogonal.

    Args:
        first: Orthonormal columns ``[d, p]``.
        second: Orthonormal columns ``[d, q]``.

    Returns:
        ``[p, q]``: at ``[i - 1, j - 1]`` the similarity of the first i columns with the first j.

    Raises:
        PEFTError: They are directions of spaces of different sizes.
    """
    if len(first) != len(second):
        raise PEFTError(
            f"Directions among {len(first)} and among {len(second)} features were given: they have nothing to compare."
        )
    sums = (first.T @ second).square().cumsum(0).cumsum(1)
    i = torch.arange(1, sums.shape[0] + 1, dtype=sums.dtype, device=sums.device)
    j = torch.arange(1, sums.shape[1] + 1, dtype=sums.dtype, device=sums.device)
    return sums / torch.minimum(i[:, None], j)


def similarity(first: WeightChange, second: WeightChange, basis: Basis = "right") -> Tensor:
    """Return φ(i, j) ``[p, q]`` of the directions of two changes of one module; see :func:`subspace_similarity`."""
    return subspace_similarity(directions(first, basis), directions(second, basis))


def random_similarity(i: int, j: int, d: int) -> float:
    """Return what φ(i, j) is on average for random spaces of ``d`` features: i · j / (min(i, j) · d)."""
    return max(i, j) / d


def share_initial_a(first: WeightChange, second: WeightChange) -> bool:
    """Whether the two A were drawn alike, as with one seed: they are then similar however they were trained.

    A short training hardly moves A, so that similarities of A, and to some degree those of ΔW's right directions, tell
    of the seed and not of the task.
    """
    if first.lora_A is None or second.lora_A is None or first.lora_A.shape[1] != second.lora_A.shape[1]:
        return False
    rows = min(len(first.lora_A), len(second.lora_A))
    one, other = first.lora_A[:rows].flatten(), second.lora_A[:rows].flatten()
    return bool(torch.nn.functional.cosine_similarity(one, other, dim=0) > _ALIKE)
