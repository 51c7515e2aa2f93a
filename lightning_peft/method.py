"""What a method is, and the registry of all methods by name."""

from __future__ import annotations

import dataclasses
import inspect
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import nn

from lightning_peft.adapter import Adapter
from lightning_peft.errors import PEFTError

_METHODS: dict[str, type[PEFTMethod]] = {}


class PEFTMethod(ABC):
    """Base of all methods: a frozen keyword-only dataclass of hyper-parameters that makes adapters.

    A concrete subclass with a ``name`` registers itself.
    """

    name: ClassVar[str] = ""
    free: ClassVar[frozenset[str]] = frozenset({"target_modules", "exclude_modules", "layers", "dropout", "init"})
    """Hyper-parameters that may differ between a checkpoint and the model that it is loaded into: they change neither
    what the adapters compute from the same tensors nor, but for the targets that the tensors' names show, which
    there are."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.name and not inspect.isabstract(cls):
            _METHODS[cls.name] = cls

    @abstractmethod
    def select(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the modules to adapt, by name.

        Raises:
            PEFTError: A pattern matches nothing, or a matched module cannot be adapted.
        """

    @abstractmethod
    def adapter(self, name: str, module: nn.Module, seed: int) -> Adapter:
        """Make the adapter of one module; its initial values depend on ``(seed, name)`` alone.

        Raises:
            PEFTError: The hyper-parameters do not fit the module.
        """

    def config(self) -> dict[str, Any]:
        """Return the hyper-parameters as plain JSON types."""
        assert dataclasses.is_dataclass(self)
        return {"method": self.name, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        return str(self.config())


def registered_methods() -> dict[str, type[PEFTMethod]]:
    """Return every method class by its registered name."""
    return dict(sorted(_METHODS.items()))


def method_from_name(name: str) -> PEFTMethod:
    """Return the method registered as ``name`` with its default hyper-parameters.

    Raises:
        PEFTError: There is no such method; the message lists those that exist.
    """
    if name not in _METHODS:
        raise PEFTError(f"Unknown method {name!r}. Methods: {', '.join(sorted(_METHODS))}.")
    return _METHODS[name]()


def method_from_config(config: dict[str, Any]) -> PEFTMethod:
    """Return the method that :meth:`PEFTMethod.config` described.

    Raises:
        PEFTError: The method is unknown, or a key is none of its hyper-parameters.
    """
    fields = dict(config)
    name = fields.pop("method", None)
    if name not in _METHODS:
        raise PEFTError(f"Unknown method {name!r}. Methods: {', '.join(sorted(_METHODS))}.")
    try:
        return _METHODS[name](**fields)
    except TypeError as error:
        raise PEFTError(f"The configuration of method {name!r} does not fit: {error}.") from error
