"""The strategy's names: ``peft``, ``peft_lora``, ``peft_lora_ddp`` and so on."""

from __future__ import annotations

from lightning.pytorch.strategies import StrategyRegistry

from lightning_peft.callbacks.other_lightning import other_registries
from lightning_peft.core.method import registered_methods
from lightning_peft.strategy.bases.names import PREFIX, base_names
from lightning_peft.strategy.strategy import PEFTStrategy


def register_strategies() -> None:
    """Register ``peft``, ``peft_<method>`` and ``peft_<method>_<base>`` with Lightning.

    They are known to ``pytorch_lightning`` too, if it is there: the strategy says why it does not serve it.
    """
    names = {PREFIX: ("lora", "auto")}
    for method in registered_methods():
        names[f"{PREFIX}_{method}"] = (method, "auto")
        names.update({f"{PREFIX}_{method}_{base}": (method, base) for base in base_names()[1:]})
    for registry in (StrategyRegistry, *other_registries()):
        for name, (method, base) in names.items():
            registry.register(
                name, PEFTStrategy, description=f"{method} on {base}", override=True, method=method, base=base
            )
