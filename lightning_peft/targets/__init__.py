"""What a model is made of: patterns, blocks, parts of fused layers, inner models.

Imports core.
"""
