"""Hyper-parameters of a checkpoint as values: a file does not say which classes and functions are called.

LightningCLI saves what it made objects from, class paths included, and the name of the function that does; Lightning
calls that function when it loads the checkpoint. Here a module is made from the values alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import nn

from lightning_peft.errors import PEFTError
from lightning_peft.operations.eject import eject_unpickled

_INSTANTIATOR, _CLASS_PATH = "_instantiator", "_class_path"  # where LightningCLI saves them
_OF_LIGHTNING = ("lightning.pytorch.cli.instantiate_module", "pytorch_lightning.cli.instantiate_module")
_KEYS_OF_OLD_LIGHTNING = ("hparams", "module_arguments")
_SEQUENCES = (list, tuple, set, frozenset)  # all of them are lists in YAML


def without_class_paths(
    kind: type[Any], checkpoint: Mapping[str, Any], given: Iterable[str]
) -> tuple[type[Any], dict[str, Any]]:
    """Return the class to make, and ``checkpoint`` with values as its only hyper-parameters.

    Args:
        kind: The class whose ``load_from_checkpoint`` was called.
        checkpoint: As it was read.
        given: Names of the hyper-parameters that the caller gives.

    Raises:
        PEFTError: The hyper-parameters name what is to be called, which neither ``kind`` nor the caller says.
    """
    plain = dict(checkpoint)
    for key in (kind.CHECKPOINT_HYPER_PARAMS_KEY, *_KEYS_OF_OLD_LIGHTNING):
        values = plain.get(key)
        if not isinstance(values, Mapping) or _INSTANTIATOR not in values:
            continue
        if values[_INSTANTIATOR] not in _OF_LIGHTNING:
            raise PEFTError(
                f"The checkpoint asks for {values[_INSTANTIATOR]!r} to be called with its hyper-parameters. That is "
                "not LightningCLI's function: it is not called. Do not use this checkpoint."
            )
        if _CLASS_PATH in values:
            kind = _imported_subclass(kind, values[_CLASS_PATH])
        plain[key] = {name: value for name, value in values.items() if name not in (_INSTANTIATOR, _CLASS_PATH)}
        _refuse_objects(kind, {name: value for name, value in plain[key].items() if name not in given})
    return kind, plain


def eject_from_modules(values: Any) -> None:
    """Make modules among hyper-parameters what they were when a LightningModule was made of them.

    They were pickled with the adapters that they had got since. Where these belong, the rest of the checkpoint says.
    """
    for module in _modules(values):
        eject_unpickled(module)


def _modules(value: Any) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _modules(inner)


def _imported_subclass(kind: type[Any], path: Any) -> type[Any]:
    module, _, name = str(path).rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    if isinstance(found, type) and issubclass(found, kind):
        return found
    raise PEFTError(
        f"The checkpoint is of the class {path!r}, which is not {kind.__name__} or a class derived from it, or is not "
        "imported. Import it, or call load_from_checkpoint of the class that was trained."
    )


def _refuse_objects(kind: type[Any], values: Mapping[str, Any]) -> None:
    try:
        hints = get_type_hints(kind.__init__, include_extras=True)
    except (NameError, TypeError):
        hints = {}  # annotations that only a type checker can read
    for name, value in values.items():
        if _has_class_path(value) or not _fits(value, hints.get(name, Any)):
            raise PEFTError(
                f"The checkpoint has {name}={_shortened(value)} from LightningCLI, to make an object from. A file does "
                f"not say what is called: pass the object, {kind.__name__}.load_from_checkpoint(path, {name}=...), or "
                "pass weights_only=False, if you trust whoever wrote the checkpoint."
            )


def _has_class_path(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "class_path" in value or any(map(_has_class_path, value.values()))
    return isinstance(value, _SEQUENCES) and any(map(_has_class_path, value))


def _fits(value: Any, hint: Any) -> bool:
    """Whether ``value``, which comes from YAML, is what an argument with the annotation ``hint`` takes."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _fits(value, parts[0])
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    kind = origin or hint
    if kind is Any or not isinstance(kind, type):
        return True
    kinds = _SEQUENCES if issubclass(kind, _SEQUENCES) else (int, float) if kind is float else kind
    if not isinstance(value, kinds):
        return False
    if isinstance(value, Mapping):
        return not parts or all(_fits(item, parts[-1]) for item in value.values())
    items: Any = value
    return not parts or all(any(_fits(item, part) for part in parts) for item in items)


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
