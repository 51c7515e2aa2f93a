"""Adapters on disk: HF PEFT's format both ways, our own, and those of sharded checkpoints.

Imports core, structure, targets, adapters.low_rank, files, formats.counterparts and
formats.additions.
"""
