"""Adapter state in memory, in directories and in checkpoints.

Imports tensors, core, structure, targets, operations, files and formats.
"""

from lightning_peft.storage.loading import load_adapter
from lightning_peft.storage.saving import save_adapter

__all__ = ["load_adapter", "save_adapter"]
