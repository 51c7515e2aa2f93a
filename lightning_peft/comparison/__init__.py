"""Comparisons: a grid of runs, each of which resumes, and a table of means over seeds.

Imports core, operations, files, storage, analysis and callbacks.
"""

from lightning_peft.comparison.cells import cells
from lightning_peft.comparison.grid import read_grid

__all__ = ["cells", "read_grid"]
