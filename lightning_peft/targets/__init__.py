"""Which modules are meant: from patterns and presets to modules, and the names that files give them.

Imports tensors, core and structure.
"""
