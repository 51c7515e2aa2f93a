"""Adapters on disk: HF PEFT's format, both ways."""
