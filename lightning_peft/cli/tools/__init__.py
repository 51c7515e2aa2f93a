"""The commands that need no Trainer: looking at adapters, changing them, and using them.

Imports core, operations, files, formats, formats.foreign, formats.serving, storage, analysis, tasks.batches
and tasks.pretrained.
"""
