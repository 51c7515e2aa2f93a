"""How an adapter hangs on a module: slots and hooks, what was injected, seeds, weights in pieces.

Imports tensors.
"""
