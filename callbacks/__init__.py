"""Callbacks, imported as ``lightning_peft.callbacks``.

Imports tensors, core, structure, files, formats, formats.serving, storage and analysis.
"""

from lightning_peft.callbacks.change_monitor import ChangeMonitor
from lightning_peft.callbacks.checkpoint import AdapterCheckpoint
from lightning_peft.callbacks.generation_samples import GenerationSamples
from lightning_peft.callbacks.hot_swap import HotSwap, send_adapter
from lightning_peft.callbacks.predictions import PredictionWriter
from lightning_peft.callbacks.summary import PEFTSummary

__all__ = [
    "AdapterCheckpoint",
    "ChangeMonitor",
    "GenerationSamples",
    "HotSwap",
    "PEFTSummary",
    "PredictionWriter",
    "send_adapter",
]
