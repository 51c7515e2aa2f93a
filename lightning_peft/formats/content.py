"""What a directory holds, in this package's terms, whatever its format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning_peft.core.adapter import CHILD
from lightning_peft.core.method import PEFTMethod

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"


@dataclass
class Part:
    """What one adapter has in one model: the content of one directory. Names are relative to ``prefix``."""

    prefix: str
    """Name of that model in the whole."""
    adapter: str
    methods: tuple[PEFTMethod, ...]
    hosts: dict[str, int] = field(default_factory=dict)
    """The adapted modules, with the position of the method."""
    chosen: list[str] = field(default_factory=list)
    """The base's parameters that the methods train."""
    train_also: list[str] = field(default_factory=list)
    """The modules trained whole, and the parameters trained by themselves."""
    whole: list[str] = field(default_factory=list)
    """All parameters of these."""
    own_format: bool = False
    """Whether it holds more than HF PEFT's format has room for."""


@dataclass(frozen=True)
class Content:
    """What an adapter directory says."""

    methods: tuple[PEFTMethod, ...]
    train_also: tuple[str, ...]
    names: Mapping[str, str]
    """Name in the model, relative to its root and without the adapter's name, by name in the file."""
    copies: Mapping[str, str]
    """Copies of base parameters, which HF PEFT writes for adapted embeddings: names as in ``names``."""
    unused: frozenset[str] = frozenset()
    """Names in the file of tensors that nothing reads."""


def with_adapter(name: str, adapter: str) -> str:
    """Return the name of a tensor in the model: ``0.peft.lora_A`` is ``0.peft.default.lora_A``."""
    parts = name.split(".")
    if CHILD in parts:
        parts.insert(parts.index(CHILD) + 1, adapter)
    return ".".join(parts)


def without_adapter(name: str) -> str:
    """Undo :func:`with_adapter`."""
    parts = name.split(".")
    if CHILD in parts:
        del parts[parts.index(CHILD) + 1]
    return ".".join(parts)
