"""What is done to a model: inject, merge, combine, eject.

Imports core, targets, adapters, adapters.bottleneck, adapters.low_rank and methods.
"""
