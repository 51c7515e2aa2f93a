"""Callbacks, imported as ``lightning_peft.callbacks``.

Imports tensors, core, structure, files, formats, formats.serving and storage.
"""

from lightning_peft.callbacks.checkpoint import AdapterCheckpoint
from lightning_peft.callbacks.hot_swap import HotSwap, send_adapter
from lightning_peft.callbacks.predictions import PredictionWriter
from lightning_peft.callbacks.summary import PEFTSummary

__all__ = ["AdapterCheckpoint", "HotSwap", "PEFTSummary", "PredictionWriter", "send_adapter"]
