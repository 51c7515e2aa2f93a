"""The Lightning strategy: one flag that turns a run into a parameter-efficient one.

Imports core, targets, operations, formats, storage, callbacks and strategy.bases.
"""

from lightning_peft.strategy.registration import register_strategies
from lightning_peft.strategy.strategy import PEFTStrategy

__all__ = ["PEFTStrategy", "register_strategies"]
