"""The low-rank change beside a module, one file for each kind of module.

Imports core and adapters.
"""
