"""What a model is made of: blocks, attention, inner models, fused and new parts, what a layer computes.

Imports tensors and core.
"""
