"""Tensors as they lie in memory: whole or in pieces, weights of layers, shadowed attributes, seeds, generators.

Imports no other package.
"""
