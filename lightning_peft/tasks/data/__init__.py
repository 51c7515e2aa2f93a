"""DataModules: one for each kind of example that the ready modules learn from.

Imports adapters.virtual_tokens, tasks.batches and tasks.pretrained.
"""

from lightning_peft.tasks.data.classification_data import ClassificationData
from lightning_peft.tasks.data.instruction_data import InstructionData
from lightning_peft.tasks.data.preference_data import PreferenceData
from lightning_peft.tasks.data.seq2seq_data import Seq2SeqData
from lightning_peft.tasks.data.token_data import TokenData

__all__ = ["ClassificationData", "InstructionData", "PreferenceData", "Seq2SeqData", "TokenData"]
