"""What is done to a model: inject, merge, combine, eject. Imports core, targets, adapters and methods."""
