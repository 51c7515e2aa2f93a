"""What has to be known about a method to write it in HF PEFT's format and to read it: a small class for each.

The format is HF PEFT 0.21's (``adapter_config.json``, ``adapter_model.safetensors``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import regex
from torch import nn

from lightning_peft.core.adapter import CHILD
from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.targets.naming import suffixes

PREFIX = "base_model.model."
UNSAID = "lightning_peft"
"""Key under which :meth:`Counterpart.read` finds what :meth:`Counterpart.unsaid` returned."""

_COUNTERPARTS: list[Counterpart] = []

Shapes = Mapping[str, tuple[int, ...]]


class Counterpart(ABC):
    """A method in HF PEFT's terms. A subclass with a ``method`` registers itself.

    Names "in the model" are relative to its root and leave out the adapter's name: ``0.q_proj.peft.lora_A``.
    """

    method: ClassVar[type[PEFTMethod]]
    peft_type: ClassVar[str]
    """HF PEFT's name of the method."""
    on_conv1d: ClassVar[bool] = True
    """Whether HF PEFT has the method for transformers' ``Conv1D``."""
    convolutions: ClassVar[tuple[type[nn.Module], ...]] = ()
    """The convolutions that the method is here for."""
    parameters: ClassVar[Mapping[str, str]] = {}
    """What follows the module's name in the file, with the name of that parameter in the adapter."""
    keys: ClassVar[frozenset[str]] = frozenset()
    """Keys of its configurations that are read, or change nothing that an adapter computes, beside the common ones."""
    plain: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Keys of options that the method has not here, with the values that leave it the method."""
    _endings: ClassVar[tuple[str, ...]] = ()
    """The same with a dot in front."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._endings = tuple(f".{suffix}" for suffix in cls.parameters)
        if "method" in cls.__dict__:
            _COUNTERPARTS.append(cls())

    def writes(self, method: PEFTMethod) -> bool:
        """Whether HF PEFT has ``method``, of class :attr:`method`, with these hyper-parameters."""
        return True

    def reads(self, config: Mapping[str, Any]) -> bool:
        """Whether a configuration of this :attr:`peft_type` is this method's."""
        return True

    @abstractmethod
    def config(self, root: ModelView, method: Any, hosts: Iterable[str], chosen: Iterable[str]) -> dict[str, Any]:
        """Return the method's own keys of ``adapter_config.json``.

        Args:
            root: The model as HF PEFT will be given it.
            method: The method.
            hosts: Names of the adapted modules.
            chosen: Names of the parameters that the method itself trains.
        """

    def unsaid(self, method: Any) -> dict[str, Any]:
        """Return what this package has to know to read the file as ``method``, and HF PEFT has no key for."""
        return {}

    @abstractmethod
    def read(self, root: ModelView, config: Mapping[str, Any], shapes: Shapes, source: str) -> PEFTMethod:
        """Return the method that a configuration and the tensors' names and shapes describe.

        Raises:
            PEFTError: They contradict each other or ``root``, or describe something that this package has not.
        """

    def parameters_of(self, module: nn.Module, method: Any) -> Mapping[str, str]:
        """Return those of :attr:`parameters` that an adapter of ``module`` has.

        Args:
            module: The adapted module.
            method: The method, if more than its class matters; its targets never do.
        """
        return self.parameters

    def names(self, root: ModelView, method: Any, hosts: Iterable[str], chosen: Iterable[str]) -> dict[str, str]:
        """Return the name in the model of every tensor of the method, by its name in the file."""
        modules = root.modules
        return {
            f"{PREFIX}{host}.{suffix}": f"{host}.{CHILD}.{parameter}"
            for host in hosts
            for suffix, parameter in self.parameters_of(modules[host], method).items()
        }

    def repeats(self, root: ModelView, method: Any, hosts: Iterable[str]) -> dict[str, str]:
        """Return, as :meth:`names`, further names in the file under which HF PEFT writes a tensor again."""
        return {}

    def owns(self, name: str) -> bool:
        """Whether a tensor in the file is the method's; others belong to modules trained whole."""
        return name.endswith(self._endings)

    def hosts(self, root: ModelView, shapes: Shapes, source: str, method: PEFTMethod | None = None) -> list[str]:
        """Return the names of the modules that the tensors of a file adapt.

        Args:
            root: The model that the file is for.
            shapes: The tensors of the file.
            source: What to call it in errors.
            method: As for :meth:`parameters_of`.

        Raises:
            PEFTError: ``root`` lacks one, a tensor of one is missing, or there is none.
        """
        found = self.grouped(shapes, source)
        modules = self.modules(root, found, source)
        self.refuse_convolutions(modules, found, source)
        for host, endings in found.items():
            if endings != set(expected := self.parameters_of(modules[host], method)):
                raise PEFTError(
                    f"{source}: {host!r} has {', '.join(sorted(endings))} alone; {', '.join(expected)} were expected. "
                    "It is damaged."
                )
        return sorted(found)

    @staticmethod
    def modules(root: ModelView, hosts: Iterable[str], source: str) -> dict[str, nn.Module]:
        """Return the modules of ``root`` by name.

        Raises:
            PEFTError: One of ``hosts`` is not among them.
        """
        modules = root.modules
        if missing := sorted(set(hosts) - modules.keys()):
            raise PEFTError(
                f"{source} adapts {missing[0]!r} and {len(missing) - 1} more modules that this {root.kind} "
                "does not have. Load the base model that the adapter was trained on."
            )
        return modules

    def refuse_convolutions(self, modules: Mapping[str, nn.Module], hosts: Iterable[str], source: str) -> None:
        """Raise :class:`PEFTError` if one of ``hosts`` is a convolution, which the method is not here for."""
        others = {nn.Conv1d, nn.Conv2d, nn.Conv3d} - {*self.convolutions}
        if convolutions := [host for host in hosts if isinstance(modules[host], tuple(others))]:
            name = type(modules[convolutions[0]]).__name__
            raise PEFTError(
                f"{source} adapts {convolutions[0]!r}, a {name}, of which there is no {self.method.__name__} here. HF "
                "PEFT makes a plain model of it: PeftModel.from_pretrained(base, path).merge_and_unload()."
            )

    def grouped(self, shapes: Shapes, source: str) -> dict[str, set[str]]:
        """Return the method's tensors, by what follows the module's name, by that name.

        Raises:
            PEFTError: There are none, or one has a name that HF PEFT does not give.
        """
        found: dict[str, set[str]] = {}
        for name in shapes:
            ending = next((ending for ending in self._endings if name.endswith(ending)), None)
            if not name.startswith(PREFIX) and (ending is not None or not self.owns(name)):
                raise PEFTError(f"{source}: the tensor {name!r} does not start with {PREFIX!r}; it is no HF PEFT file.")
            if ending is not None:
                found.setdefault(name[len(PREFIX) : -len(ending)], set()).add(ending[1:])
        if not found:
            raise PEFTError(f"{source} holds no {self.peft_type} tensors.")
        return found


def for_method(method: PEFTMethod) -> Counterpart | None:
    """Return the counterpart of ``method``, if HF PEFT has one."""
    return next((c for c in _COUNTERPARTS if c.method is type(method) and c.writes(method)), None)


def for_config(config: Mapping[str, Any], source: str) -> Counterpart:
    """Return the counterpart that reads a configuration.

    Raises:
        PEFTError: There is none.
    """
    kind = config.get("peft_type")
    for counterpart in _COUNTERPARTS:
        if counterpart.peft_type == kind and counterpart.reads(config):
            return counterpart
    known = sorted({counterpart.peft_type for counterpart in _COUNTERPARTS})
    raise PEFTError(
        f"{source} is an adapter of type {kind!r}; {', '.join(known)} can be read. Where HF PEFT is installed, its "
        "PeftModel.from_pretrained(base, path).merge_and_unload() makes a plain model of it, if it can be merged."
    )


def require_numbers(config: Mapping[str, Any], keys: Iterable[str], source: str) -> None:
    """Raise :class:`PEFTError` if one of ``keys`` is no number in a configuration."""
    for key in keys:
        if not isinstance(config.get(key), int | float):
            raise PEFTError(f"{source}: its configuration has {key}={config.get(key)!r}; a number was expected.")


def targets_for_hf(hosts: Iterable[str], root: ModelView) -> list[str] | str:
    """Return ``target_modules`` as HF PEFT reads it."""
    hosts = list(hosts)
    return suffixes(hosts, root.modules) or "|".join(map(regex.escape, hosts))
