"""One file per method. Importing this package registers them all."""

from lightning_peft.methods.lora import LoRA

__all__ = ["LoRA"]
