"""Which of several models in a module another module belongs to; each model has files of its own."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lightning_peft.targets.select import transformers_models


def is_lightning_module(model: nn.Module) -> bool:
    """Whether ``model`` is a LightningModule; known by what it offers, since nothing here imports lightning."""
    return hasattr(model, "configure_optimizers") and hasattr(model, "training_step")


class InnerModels:
    """The models in ``model``: transformers models, and the attributes of a LightningModule.

    Args:
        model: A model, or a LightningModule that holds some.
        adapted: Names of all modules that are adapted. A layer that is itself an attribute of the LightningModule
            cannot be the model that it is a layer of: if there is one, attributes are no models of their own.
    """

    def __init__(self, model: nn.Module, adapted: Iterable[str]) -> None:
        self.transformers = [prefix for prefix in transformers_models(model) if prefix]
        self._split = is_lightning_module(model) and all("." in name for name in adapted)

    def around(self, name: str) -> str:
        """Return the name of the model that the module or parameter ``name`` belongs to, ``""`` for the whole."""
        inner = next((p for p in self.transformers if name == p or name.startswith(f"{p}.")), None)
        if inner is not None:
            return inner
        return name.split(".")[0] if self._split else ""
