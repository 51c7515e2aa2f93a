"""What a run is refused for: setups in which adapters would be lost, mixed or not trained, without a word."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import Strategy
from torch import nn

from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.registry import registries
from lightning_peft.core.sharding import full_shape
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.storage.state import adapter_parameters_and_whole


def refuse_averaging(trainer: pl.Trainer) -> None:
    """Check that no callback averages weights.

    Raises:
        PEFTError: One does, of a copy of the model that was made before there were adapters.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            raise PEFTError(
                f"{type(callback).__name__} copies the model before adapters are injected and would average the frozen "
                "weights. Leave it out of the callbacks."
            )


def refuse_other_methods(view: ModelView, given: Sequence[PEFTMethod]) -> None:
    """Check that each adapter of a model is of the methods ``given`` to the strategy.

    Raises:
        PEFTError: One is of others.
    """
    present = [methods for _, _, registry in registries(view) for methods in registry.methods.values()]
    for methods in present:
        theirs, ours = ([type(method) for method in found] for found in (methods, given))
        if theirs != ours:
            names = [" + ".join(method.__name__ for method in found) for found in (theirs, ours)]
            raise PEFTError(
                f"The model already has adapters of method {names[0]}, the strategy was given {names[1]}. Give "
                "both the same method, or call eject(model) first."
            )


def refuse_late_train_also(view: ModelView, train_also: Sequence[str]) -> None:
    """Check that ``train_also`` had an effect when the adapters of a model were injected.

    Raises:
        PEFTError: It had none.
    """
    if train_also and not any(registry.train_also for _, _, registry in registries(view)):
        raise PEFTError(
            f"The model already has adapters, so train_also={train_also!r} would have no effect. Pass it to "
            "inject, or leave the injection to the strategy."
        )


def refuse_reading_late_weights(methods: Sequence[PEFTMethod]) -> None:
    """Check that no method starts from weights that are loaded after the injection.

    Raises:
        PEFTError: One does.
    """
    if reading := [method for method in methods if method.reads_weights]:
        raise PEFTError(
            f"{type(reading[0]).__name__} starts from the model's weights, but base_weights are loaded after the "
            "injection. Load them in configure_model with load_base_weights, or start at random."
        )


def refuse_different_ranks(strategy: Strategy, view: ModelView) -> None:
    """Check that every process trains the same adapters: a collective over different ones would hang or mix them.

    Raises:
        PEFTError: One does not; raised on every process.
    """
    shapes = {name: list(full_shape(p)) for name, p in adapter_parameters_and_whole(view).items()}
    first = strategy.broadcast(shapes)
    differing = sorted(n for n in first.keys() | shapes.keys() if first.get(n) != shapes.get(n))
    count = strategy.reduce(torch.tensor(float(bool(differing)), device=strategy.root_device), reduce_op="sum")
    if count:
        name = next(iter(differing), None)
        where = f"here {name!r} is {shapes.get(name)}, on rank 0 {first.get(name)}" if name else "see the other ranks"
        raise PEFTError(
            f"{int(count)} processes have other adapters than rank 0: {where}. Build the same model on each."
        )


def refuse_unserved(strategy: Strategy, module: nn.Module, base_name: str, is_set_up: bool) -> None:
    """Check that the base strategy went the way of Lightning's own.

    Raises:
        PEFTError: It is a strategy of the user's that leaves out a call.
    """
    held = {id(p) for optimizer in strategy.optimizers for group in optimizer.param_groups for p in group["params"]}
    for missing, call in (
        (not is_set_up, "self.precision_plugin.convert_module(self.model)"),
        (any(id(p) in held and not p.requires_grad for p in module.parameters()), "self.setup_optimizers(trainer)"),
    ):
        if missing:
            raise PEFTError(
                f"The base strategy {base_name} does not call {call} in setup, where adapters are injected "
                "and optimizers restricted. Call it there, or call super().setup(trainer)."
            )
