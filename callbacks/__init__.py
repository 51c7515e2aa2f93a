"""Callbacks, imported as ``lightning_peft.callbacks``."""

from lightning_peft.callbacks.checkpoint import AdapterCheckpoint
from lightning_peft.callbacks.summary import PEFTSummary

__all__ = ["AdapterCheckpoint", "PEFTSummary"]
