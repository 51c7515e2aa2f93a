"""Ready LightningModules and DataModules, so that a config alone can run.

Imports core, structure, adapters.virtual_tokens, operations, tasks.answers, tasks.batches, tasks.data and
tasks.pretrained.
"""

from lightning_peft.tasks.causal_lm import CausalLM
from lightning_peft.tasks.data import ClassificationData, InstructionData, PreferenceData, Seq2SeqData, TokenData
from lightning_peft.tasks.forgetting import Forgetting
from lightning_peft.tasks.preference_tuning import PreferenceTuning
from lightning_peft.tasks.seq2seq import Seq2Seq
from lightning_peft.tasks.sequence_classification import SequenceClassification
from lightning_peft.tasks.sharded_causal_lm import ShardedCausalLM
from lightning_peft.tasks.token_classification import TokenClassification

__all__ = [
    "CausalLM",
    "ClassificationData",
    "Forgetting",
    "InstructionData",
    "PreferenceData",
    "PreferenceTuning",
    "Seq2Seq",
    "Seq2SeqData",
    "SequenceClassification",
    "ShardedCausalLM",
    "TokenClassification",
    "TokenData",
]
