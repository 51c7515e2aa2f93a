"""Adapters in other tools' formats, those of which the way is exact: read as HF PEFT's or our own, some written.

Imports tensors, core, structure, targets, adapters.virtual_tokens, methods, files, formats and formats.counterparts.
"""
