"""Finding a base strategy by its name."""

from __future__ import annotations

from lightning.pytorch.strategies import Strategy, StrategyRegistry

from lightning_peft.errors import PEFTError, near

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
        hint = near(name, base_names())
        raise PEFTError(f"Unknown base strategy {name!r}. {hint}Base strategies: {', '.join(base_names())}.")
    strategy = StrategyRegistry.get(name)
    assert isinstance(strategy, Strategy)
    return strategy


def _ours(name: str) -> bool:
    return name == PREFIX or name.startswith(f"{PREFIX}_")
