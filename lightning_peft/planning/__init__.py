"""Memory per device, worked out before anything is loaded.

Imports core, targets and adapters.virtual_tokens.
"""
