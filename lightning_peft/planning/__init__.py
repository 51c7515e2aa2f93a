"""Memory per device, worked out before anything is loaded.

Imports core, structure and adapters.virtual_tokens.
"""
