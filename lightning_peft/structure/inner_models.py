"""Which of several models in a module another module belongs to; each model has files of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import nn

from lightning_peft.core.view import ModelView, once


@once
def transformers_models(model: ModelView) -> Mapping[str, nn.Module]:
    """Return the outermost transformers models in ``model``, by name; known by what they offer, not by import."""
    found: dict[str, nn.Module] = {}
    lead: str | None = None
    for name, module in model.modules.items():
        # What is inside a module follows it.
        if lead is not None and name.startswith(lead):
            continue
        if hasattr(type(module), "save_pretrained") and hasattr(type(module), "get_output_embeddings"):
            found[name] = module
            lead = f"{name}." if name else ""
    return found


@once
def head_modules(model: ModelView) -> set[int]:
    """Ids of the modules of the output heads: what a transformers model has beside its base model."""
    heads: set[int] = set()
    for name, module in transformers_models(model).items():
        whole = model.part(name)
        base = getattr(module, "base_model", module)
        if base is not module:
            body = next(part for part, found in whole.walked if found is base)
            inside = {id(part) for _, part in whole.part(body).walked}
            heads |= {id(part) for _, part in whole.walked} - inside
        output = cast(Any, module).get_output_embeddings()
        heads |= {id(output)} if output is not None else set()
    return heads


def input_embedding(model: nn.Module) -> nn.Module | None:
    """Return the input embedding of a transformers model, if it has just one."""
    try:
        return cast(Any, model).get_input_embeddings()  # type: ignore[no-any-return]
    except NotImplementedError:  # models with several, such as CLIP
        return None


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

    def __init__(self, model: ModelView, adapted: Iterable[str]) -> None:
        self.transformers = [prefix for prefix in transformers_models(model) if prefix]
        self._split = is_lightning_module(model.module) and all("." in name for name in adapted)

    def around(self, name: str) -> str:
        """Return the name of the model that the module or parameter ``name`` belongs to, ``""`` for the whole."""
        inner = next((p for p in self.transformers if name == p or name.startswith(f"{p}.")), None)
        if inner is not None:
            return inner
        return name.split(".")[0] if self._split else ""
