"""What data files hold, and how a language model sees it.

Imports tensors and adapters.virtual_tokens.
"""
