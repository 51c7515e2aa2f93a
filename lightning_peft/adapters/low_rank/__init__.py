"""The low-rank change beside a module, one file for each kind of module.

Imports tensors, core and adapters.
"""
