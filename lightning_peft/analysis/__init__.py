"""What adapters have done to a model's weights: sizes, spectra, subspaces, amplification, and plots of them.

Imports tensors, core, adapters.low_rank, operations, files, formats and formats.counterparts.
"""

from lightning_peft.analysis.amplification import Amplification, amplification
from lightning_peft.analysis.changes import WeightChange, changes, read_changes
from lightning_peft.analysis.subspaces import (
    Basis,
    directions,
    random_similarity,
    share_initial_a,
    similarity,
    subspace_similarity,
)

__all__ = [
    "Amplification",
    "Basis",
    "WeightChange",
    "amplification",
    "changes",
    "directions",
    "random_similarity",
    "read_changes",
    "share_initial_a",
    "similarity",
    "subspace_similarity",
]
