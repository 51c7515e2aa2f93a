"""Methods beside another one: what HF PEFT's configuration of one method can say of others, by a key of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.view import ModelView
from lightning_peft.formats.counterpart import Counterpart, Shapes, for_method

_ADDITIONS: list[Addition] = []


@dataclass(frozen=True)
class Used:
    """A method, with names that are relative to the model of the file, and what it has in that model."""

    method: PEFTMethod
    hosts: Sequence[str]


class Addition(ABC):
    """What HF PEFT trains beside adapters of another method. A subclass with a ``method`` registers itself."""

    method: ClassVar[type[PEFTMethod]]
    key: ClassVar[str]
    """Of the configuration."""
    types: ClassVar[frozenset[str]]
    """HF PEFT's methods whose configurations have the key."""
    several: ClassVar[bool] = False
    """Whether the key has room for several such methods."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "method" in cls.__dict__:
            _ADDITIONS.append(cls())

    def writes(self, method: PEFTMethod) -> bool:
        """Whether HF PEFT has ``method``, of class :attr:`method`, with these hyper-parameters."""
        return True

    @abstractmethod
    def value(self, root: ModelView, main: Used, given: Sequence[Used], chosen: Sequence[str]) -> Any:
        """Return the value of :attr:`key`.

        Args:
            root: The model as HF PEFT will be given it.
            main: The method that the configuration is of.
            given: The methods of class :attr:`method`.
            chosen: Names of the base's parameters that are trained.
        """

    @abstractmethod
    def names(self, root: ModelView, main: Used, given: Sequence[Used], chosen: Sequence[str]) -> dict[str, str]:
        """Return the name in the model of every tensor, by its name in the file."""

    @abstractmethod
    def owns(self, config: Mapping[str, Any], name: str) -> bool:
        """Whether a tensor of the file, which is not the main method's, is one of these methods'."""

    @abstractmethod
    def read(
        self, root: ModelView, config: Mapping[str, Any], names: Sequence[str], shapes: Shapes, source: str
    ) -> list[PEFTMethod]:
        """Return the methods that a configuration and the tensors ``names``, which are theirs, describe.

        Raises:
            PEFTError: They contradict each other or ``root``.
        """


@dataclass(frozen=True)
class Form:
    """How methods are written in HF PEFT's format."""

    counterpart: Counterpart
    main: int
    """Position of the method that the configuration is of."""
    added: Mapping[Addition, Sequence[int]]
    """Positions of the other methods."""


def form_of(methods: Iterable[PEFTMethod]) -> Form | None:
    """Return how ``methods`` are written, if HF PEFT has them together."""
    given = list(methods)
    mains = {i: found for i, method in enumerate(given) if (found := for_method(method)) is not None}
    for main, counterpart in mains.items():
        added: dict[Addition, list[int]] = {}
        for i in range(len(given)):
            addition = None if i == main else _addition_to(counterpart, given[i])
            if addition is not None:
                added.setdefault(addition, []).append(i)
        written = 1 + sum(map(len, added.values()))
        if written == len(given) and all(addition.several or len(at) == 1 for addition, at in added.items()):
            return Form(counterpart, main, added)
    return None


def additions_to(counterpart: Counterpart) -> list[Addition]:
    """Return what configurations of a method have room for."""
    return [addition for addition in _ADDITIONS if counterpart.peft_type in addition.types]


def _addition_to(counterpart: Counterpart, method: PEFTMethod) -> Addition | None:
    found = (addition for addition in additions_to(counterpart) if addition.method is type(method))
    return next((addition for addition in found if addition.writes(method)), None)
