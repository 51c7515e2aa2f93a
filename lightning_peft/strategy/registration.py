"""The strategy's names, ``peft``, ``peft_lora``, ``peft_lora_ddp`` and so on, and what else a Trainer is given."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.pytorch.strategies import StrategyRegistry

from lightning_peft.callbacks.other_lightning import other_registries
from lightning_peft.core.method import PEFTMethod, registered_methods
from lightning_peft.errors import PEFTError, near
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
    StrategyRegistry.available_strategies = lambda: _OfTrainer(StrategyRegistry)  # type: ignore[method-assign]
    STRATEGY_REGISTRY.available_strategies = lambda: _OfFabric(STRATEGY_REGISTRY)  # type: ignore[method-assign]


class _OfTrainer(list[str]):
    """The names that a Trainer knows. It asks first of all whether what it was given is among them."""

    def __contains__(self, given: object) -> bool:
        if isinstance(given, PEFTStrategy):
            given.begin()
        if isinstance(given, PEFTMethod):
            raise PEFTError(f"A method was given as strategy. Write PEFTStrategy({type(given).__name__}(...)).")
        found = super().__contains__(given)
        if not found and isinstance(given, str) and given.startswith(PREFIX):
            register_strategies()  # a method may have been defined since
            found = given in StrategyRegistry
        if not found and isinstance(given, str) and _means_ours(given):
            raise PEFTError(
                f"There is no strategy {given!r}. {near(_ours(given), self)}Names are {PREFIX}, {PREFIX}_METHOD and "
                f"{PREFIX}_METHOD_BASE. Methods: {', '.join(registered_methods())}."
            )
        return found


class _OfFabric(list[str]):
    """The names that a Fabric knows, which asks too."""

    def __contains__(self, given: object) -> bool:
        if isinstance(given, PEFTStrategy) or (isinstance(given, str) and given.startswith(PREFIX)):
            name = given if isinstance(given, str) else "A PEFTStrategy"
            raise PEFTError(
                f"{name} was given to a Fabric; it is a Trainer's. With Fabric write lightning_peft.inject(model, "
                "LoRA(r=8)) before fabric.setup(model), and lightning_peft.save_adapter(model, path) to save."
            )
        return super().__contains__(given)


def _means_ours(name: str) -> bool:
    """Whether ``name``, which no strategy has, is meant to be one of this package's."""
    return name.startswith(PREFIX) or name in _with_names(registered_methods())


def _with_names(methods: Iterable[str]) -> set[str]:
    return {spelling for method in methods for spelling in (method, method.replace("_", ""), method.replace("_", "-"))}


def _ours(name: str) -> str:
    return name if name.startswith(PREFIX) else f"{PREFIX}_{name}"
