"""Bottlenecks beside and behind modules, and where they tap a residual stream.

Imports tensors, core and adapters.
"""
