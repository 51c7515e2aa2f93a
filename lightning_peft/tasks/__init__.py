"""Ready LightningModules and DataModules, so that a config alone can run.

Imports tensors, core, structure and adapters.virtual_tokens.
"""

from lightning_peft.tasks.causal_lm import CausalLM
from lightning_peft.tasks.classification_data import ClassificationData
from lightning_peft.tasks.instruction_data import InstructionData
from lightning_peft.tasks.sequence_classification import SequenceClassification

__all__ = ["CausalLM", "ClassificationData", "InstructionData", "SequenceClassification"]
