"""This package's own format, for methods that HF PEFT has not, alone or together.

The files are called as in HF PEFT's format, which refuses the ``peft_type``. Tensors are called as in the model,
without the adapter's name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning_peft.core.adapter import CHILD
from lightning_peft.core.method import method_from_config
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.formats.configuration import named_base
from lightning_peft.formats.content import Content, Part, without_adapter

PEFT_TYPE = "LIGHTNING_PEFT"


def config_of(root: ModelView, part: Part) -> dict[str, Any]:
    """Return ``adapter_config.json`` for the adapters of ``part`` on modules of ``root``."""
    return {
        "peft_type": PEFT_TYPE,
        **named_base(root),
        "methods": [method.config() for method in part.methods],
        "train_also": part.train_also,
    }


def tensor_names(part: Part, tensors: Iterable[str]) -> dict[str, str]:
    """Return the name in the model, without the adapter's, by the name in the file: they are the same.

    Args:
        part: What to write.
        tensors: Names of all adapter tensors of the model, relative to the part's prefix.
    """
    starts = tuple(f"{host}.{CHILD}.{part.adapter}.".lstrip(".") for host in part.hosts)
    names = [without_adapter(name) for name in tensors if name.startswith(starts)] if starts else []
    return {name: name for name in [*names, *part.chosen, *part.whole]}


def read_content(config: Mapping[str, Any], names: Iterable[str], source: str) -> Content:
    """Read a configuration and the tensors' names.

    Raises:
        PEFTError: The configuration is damaged, or a method of it is unknown.
    """
    methods, train_also = config.get("methods"), config.get("train_also", [])
    if not isinstance(methods, list) or not methods or not all(isinstance(method, dict) for method in methods):
        raise PEFTError(f"{source}: its configuration has methods={methods!r}; a list of objects was expected.")
    if not isinstance(train_also, list) or not all(isinstance(name, str) for name in train_also):
        raise PEFTError(f"{source}: its configuration has train_also={train_also!r}; a list of names was expected.")
    return Content(
        tuple(method_from_config(method) for method in methods), tuple(train_also), {n: n for n in names}, {}
    )
