"""Adapters in other tools' formats, as HF PEFT's: a file a tool, for those of which the way is exact.

Imports tensors, core, targets, files and formats.
"""
