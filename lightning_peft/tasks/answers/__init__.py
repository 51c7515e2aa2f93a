"""The answers of language models: scores of their tokens, generation, and metrics of what was generated.

Imports core and adapters.virtual_tokens.
"""
