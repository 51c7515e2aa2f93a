"""Ready LightningModules and DataModules, so that a config alone can run."""

from lightning_peft.tasks.causal_lm import CausalLM
from lightning_peft.tasks.instruction_data import InstructionData

__all__ = ["CausalLM", "InstructionData"]
