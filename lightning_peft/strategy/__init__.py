"""The Lightning strategy: one flag that turns a run into a parameter-efficient one.

Imports tensors, core, structure, targets, operations, files, formats, formats.peft_config,
storage, callbacks, strategy.optimizers and strategy.bases.
"""

from lightning_peft.strategy.registration import register_strategies
from lightning_peft.strategy.strategy import PEFTStrategy

__all__ = ["PEFTStrategy", "register_strategies"]
