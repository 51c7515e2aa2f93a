"""Callbacks, imported as ``lightning_peft.callbacks``.

Imports tensors, core, structure, files and storage.
"""

from lightning_peft.callbacks.checkpoint import AdapterCheckpoint
from lightning_peft.callbacks.predictions import PredictionWriter
from lightning_peft.callbacks.summary import PEFTSummary

__all__ = ["AdapterCheckpoint", "PEFTSummary", "PredictionWriter"]
