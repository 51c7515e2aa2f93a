"""What is done to a model: inject, merge, combine, eject.

Imports tensors, core, structure, targets, adapters, adapters.bottleneck, adapters.low_rank and methods.
"""
