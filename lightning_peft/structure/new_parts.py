"""Parts of a model that mean nothing yet: their values were drawn, not loaded with those of the rest."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, cast

from torch import Tensor, nn

from lightning_peft.core.view import ModelView
from lightning_peft.structure.attention import surrounding
from lightning_peft.structure.inner_models import head_modules, input_embedding, transformers_models
from lightning_peft.tensors.packed import is_packed
from lightning_peft.tensors.sharding import full_shape

# transformers marks what it has loaded, in order not to draw values for it.
_LOADED = "_is_hf_initialized"


def heads(model: ModelView) -> list[str]:
    """Return what transformers models have beside their base model, but for layers without parameters."""
    found = head_modules(model)
    inside = {name for name, module in model.modules.items() if id(module) in found}
    return outermost(model, {name for name in model.parameters if name.rpartition(".")[0] in inside})


def new_parts(model: ModelView) -> list[str]:
    """Return the parts of transformers models for which their checkpoint had no values.

    A model that was built from a configuration alone is new as a whole, and has no new parts.
    """
    enlarged = {id(module.weight) for module, _, _ in _enlarged(model)}
    found: set[str] = set()
    for prefix in transformers_models(model):
        own = {name: p for name, p in model.parameters.items() if prefix in surrounding(name)}
        # What a quantiser packs are parameters of its own.
        new = {n for n, p in own.items() if not (_is_loaded(p) or id(p) in enlarged or is_packed(_owner(model, n)))}
        found |= new if len(new) < len(own) else set()
    return outermost(model, found)


def parts_beside(model: ModelView) -> list[str]:
    """Return the modules beside transformers models that were loaded, such as a head of the user's own."""
    roots, parameters = transformers_models(model), model.parameters
    if not any(map(_is_loaded, parameters.values())):
        return []
    return outermost(model, {name for name in parameters if not any(around in roots for around in surrounding(name))})


def last_layer(model: ModelView) -> str | None:
    """Return the last module with a matrix of its own, if it is in no transformers model."""
    roots = transformers_models(model)
    matrices = [name.rpartition(".")[0] for name, p in model.parameters.items() if len(full_shape(p)) > 1]
    if not matrices or any(around in roots for around in surrounding(matrices[-1])):
        return None
    return matrices[-1]


def new_rows(model: ModelView) -> dict[str, tuple[int, int]]:
    """Return the embeddings of enlarged vocabularies, of inputs and outputs, by name, with their old and new sizes."""
    sizes = {id(module): (before, now) for module, before, now in _enlarged(model)}
    return {name: sizes[id(module)] for name, module in model.modules.items() if id(module) in sizes}


def outermost(model: ModelView, parameters: Collection[str]) -> list[str]:
    """Return the largest modules that have no parameters but those, and those of other modules by themselves."""
    around: dict[bool, set[str]] = {True: set(), False: set()}
    for name in model.parameters:
        around[name in parameters].update(surrounding(name)[1:])
    whole = around[True] - around[False] - {""}
    names = [
        *(name for name in model.modules if name in whole),
        *(name for name in model.parameters if name in parameters),
    ]
    return [name for name in names if not any(outer in whole for outer in surrounding(name)[1:])]


def _owner(model: ModelView, parameter: str) -> nn.Module:
    return model.modules[parameter.rpartition(".")[0]]


def _is_loaded(parameter: Tensor) -> bool:
    return bool(getattr(parameter, _LOADED, False))


def _enlarged(model: ModelView) -> Iterator[tuple[Any, int, int]]:
    """Yield the embeddings that have more rows than the checkpoint of their model, with the sizes of both."""
    for module in transformers_models(model).values():
        before = _rows_in_checkpoint(cast(Any, module).config)
        embeddings: tuple[Any, Any] = (input_embedding(module), cast(Any, module).get_output_embeddings())
        for embedding in embeddings:
            if before is not None and embedding is not None and (now := full_shape(embedding.weight)[0]) > before:
                yield embedding, before, now


def _rows_in_checkpoint(config: Any) -> int | None:
    """Return the size of the vocabulary of the checkpoint that ``config`` was read with, if it is at hand."""
    path = getattr(config, "_name_or_path", None)
    if not path:
        return None
    try:
        size = type(config).from_pretrained(path, local_files_only=True).get_text_config().vocab_size
    except (OSError, ValueError, AttributeError):  # it was moved or is not in the cache; or it is no model of texts
        return None
    return size if isinstance(size, int) else None
