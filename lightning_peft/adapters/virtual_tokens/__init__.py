"""Tokens that a model is given beside its input: on the text, and on keys and values.

Imports tensors, core and structure.
"""
