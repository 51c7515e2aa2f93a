"""Copies of adapters for programs that read less of HF PEFT's format than HF PEFT does, and what each of them reads.

Imports formats and formats.counterparts.
"""

from lightning_peft.formats.serving.plain import RANKS, serving_copy

__all__ = ["RANKS", "serving_copy"]
