"""What a LightningCLI, the package's or a user's own, says of a config in which a method or another class is wrong.

Imports core.
"""
