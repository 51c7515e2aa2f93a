"""What several methods share: a package for each kind of adapter, and rows of a batch with adapters of their own.

Imports tensors and core.
"""
