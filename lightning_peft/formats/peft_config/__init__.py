"""HF PEFT's configuration objects, of adapters that are still to be made, as methods.

Imports core, targets, methods and formats.
"""
