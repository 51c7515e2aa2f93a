"""Base strategies: finding one by name, and what differs between them."""

from __future__ import annotations

from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
    StrategyRegistry,
)

from lightning_peft.errors import PEFTError

PREFIX = "peft"
"""Our own registered names begin with it."""


def base_names() -> list[str]:
    """Return the names that ``PEFTStrategy(base=…)`` takes: ``"auto"`` and every registered Lightning strategy."""
    return ["auto", *(name for name in StrategyRegistry.available_strategies() if not _ours(name))]


def strategy_from_name(name: str) -> Strategy:
    """Return a new Lightning strategy by its registered name.

    Raises:
        PEFTError: There is no such strategy; the message lists those that exist.
    """
    if name not in base_names()[1:]:
        raise PEFTError(f"Unknown base strategy {name!r}. Base strategies: {', '.join(base_names())}.")
    strategy = StrategyRegistry.get(name)
    assert isinstance(strategy, Strategy)
    return strategy


def behaviour(base: type[Strategy]) -> tuple[tuple[type, ...], tuple[type, ...]]:
    """Return the classes that stand above and below ``PEFTStrategy`` on strategies of class ``base``."""
    # Imported here: what differs by base is written in terms of this package's functions, which import this module.
    from lightning_peft.strategy.bases.deepspeed import EngineFiles, OnDeepSpeed
    from lightning_peft.strategy.bases.fsdp import OnFSDP
    from lightning_peft.strategy.bases.model_parallel import OnModelParallel
    from lightning_peft.strategy.bases.plain import PlainState

    if issubclass(base, FSDPStrategy):
        return (OnFSDP,), (PlainState,)
    if issubclass(base, ModelParallelStrategy):
        return (OnModelParallel,), (PlainState,)
    if issubclass(base, DeepSpeedStrategy):
        return (OnDeepSpeed,), (EngineFiles, PlainState)
    return (), ()


def _ours(name: str) -> bool:
    return name == PREFIX or name.startswith(f"{PREFIX}_")
