"""The Lightning strategy: the lifecycle of a run, and what differs by base strategy. Imports everything below."""

from lightning_peft.strategy.registration import register_strategies
from lightning_peft.strategy.strategy import PEFTStrategy

__all__ = ["PEFTStrategy", "register_strategies"]
