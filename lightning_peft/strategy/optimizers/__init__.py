"""What optimizers hold: which parameters, in which groups, by which names in checkpoints.

Imports tensors, core, operations and storage.
"""
