"""How a change stands to the weight that it changes (LoRA, arXiv:2106.09685, section 7.3, table 7, appendix H)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_peft.analysis.changes import WeightChange
from lightning_peft.analysis.subspaces import subspace_similarity
from lightning_peft.errors import PEFTError


@dataclass(frozen=True, eq=False)
class Amplification:
    """A row of the paper's table 7: what of W lies in the r strongest directions of ΔW, of W itself, and at random."""

    rank: int
    weight_norm: float
    """‖W‖."""
    change_norm: float
    """‖ΔW‖."""
    in_change: float
    """‖Uᵀ W V‖ with the r first singular directions of ΔW."""
    in_weight: float
    """The same with those of W: √(σ₁² + … + σᵣ²), the most that there is."""
    in_random: float
    """The same with random directions, on average: ‖W‖ · r / √(out · in)."""
    overlap: Tensor
    """φ(i, j) ``[k, r]`` of W's right directions, all of them, with those of ΔW (appendix H.3)."""

    @property
    def in_top(self) -> float:
        """φ of the first tenth of W's right directions with those of ΔW (appendix H.3): how far ΔW lies in them.

        By chance it is ``max(i, j) / in`` for i and j directions: a tenth, if the change has fewer.
        """
        return float(self.overlap[max(1, len(self.overlap) // 10) - 1, -1])

    @property
    def factor(self) -> float:
        """‖ΔW‖ / ‖Uᵀ W V‖: how much the change amplifies directions that W has already, but hardly."""
        return self.change_norm / self.in_change if self.in_change else float("inf")


@torch.no_grad()
def amplification(change: WeightChange, rank: int | None = None) -> Amplification:
    """Compare a change with its weight. W's own directions cost a singular value decomposition of it.

    Args:
        change: A change whose ``weight`` is there.
        rank: How many directions to take; as many as the change has by default.

    Raises:
        PEFTError: The weight is missing, or there are not so many directions.
    """
    if change.weight is None:
        raise PEFTError("The weight that is changed is needed to compare the change with it: name the base model.")
    u, _, v = change.singular
    kept = change.rank
    r = kept if rank is None else rank
    if not 1 <= r <= kept:
        raise PEFTError(f"rank={rank} was given; this change has {kept} directions. Take one of 1 to {kept}.")
    weight = change.weight.double()
    _, own, right = torch.linalg.svd(weight, full_matrices=False)
    norm = float(torch.linalg.vector_norm(own))
    out_features, in_features = weight.shape
    return Amplification(
        rank=r,
        weight_norm=norm,
        change_norm=change.norm,
        in_change=float(torch.linalg.vector_norm(u[:, :r].T @ weight @ v[:, :r])),
        in_weight=float(torch.linalg.vector_norm(own[:r])),
        in_random=norm * r / (out_features * in_features) ** 0.5,
        overlap=subspace_similarity(right.T, v[:, :r]),
    )
