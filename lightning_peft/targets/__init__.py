"""What a model is made of: patterns, blocks, parts, inner models. Imports core."""
