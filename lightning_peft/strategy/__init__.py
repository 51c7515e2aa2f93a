"""The Lightning strategy: the lifecycle of a run, and what differs by base strategy. Imports everything below."""

from lightning_peft.strategy.strategy import PEFTStrategy, register_strategies

__all__ = ["PEFTStrategy", "register_strategies"]
