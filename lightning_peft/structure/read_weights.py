"""Weights that are read by other code than that of the module which holds them, such as a tied decoder's.

What an adapter adds is seen by what calls its module. Who reads the weight itself sees it without the adapter, and with
it once it is merged.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_peft.core.view import ModelView

# Of these, one argument counts or none: they take a shape or a dtype from others.
_FIRST_ONLY = frozenset({"to", "type_as", "expand_as", "view_as", "reshape_as"})
# These leave nothing of what they write to: whoever has a copy made before each use reads the original.
_COPIES = frozenset({"copy_", "_foreach_copy_", "set_"})


class WeightReads(TorchFunctionMode):
    """While it is entered, notes what is made of weights outside of their modules, where it meets what is trained.

    Averages, penalties and casts of frozen weights meet nothing of that, and no merge changes what becomes of them.
    Compiled code is not looked into.

    Args:
        model: The model.
        weights: The frozen weights to watch, by the name of the module that reads them.
    """

    def __init__(self, model: ModelView, weights: Mapping[str, Iterable[Tensor]]) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        """By the name of a module, the function that reads its weight elsewhere."""
        self._names = {id(weight): name for name, own in weights.items() for weight in own}
        self._holders = {key: {id(model.modules[name])} for key, name in self._names.items()}
        for _, module in model.walked:
            for parameter in module._parameters.values():
                if id(parameter) in self._names:
                    self._holders[id(parameter)].add(id(module))
        self._made = WeakTensorKeyDictionary()
        """What was made of a weight and does not depend on what is trained: the module's name, and the function."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call ``func``, and note whether it reads a weight."""
        result = func(*args, **(kwargs or {}))
        if not torch.compiler.is_compiling():
            self._note(getattr(func, "__name__", ""), (*args, *(kwargs or {}).values()), result)
        return result

    def _note(self, function: str, given: tuple[Any, ...], result: Any) -> None:
        if function.startswith("new_") or function.endswith("_like"):
            return
        made = [tensor for tensor in _tensors((result,)) if tensor.dim()]
        read = self._read(given[:1] if function in _FIRST_ONLY else given) if made else None
        if read is None:
            return
        for tensor in made:
            if tensor.requires_grad:
                self.found.setdefault(*read)
            elif function in _COPIES or not isinstance(tensor, nn.Parameter):  # else an average, or a norm, of its own
                self._made[tensor] = read

    def _read(self, given: tuple[Any, ...]) -> tuple[str, str] | None:
        """Return whose weight is among ``given``, or one of them was made of, and the function that reads it."""
        for tensor in _tensors(given):
            if tensor in self._made:
                read: tuple[str, str] = self._made[tensor]
                return read
            holders = self._holders.get(id(tensor))
            if holders is not None and (reader := _reader(holders)) is not None:
                return self._names[id(tensor)], reader
        return None


def _tensors(given: Sequence[Any]) -> Iterator[Tensor]:
    for value in given:
        yield from (v for v in (value if isinstance(value, list | tuple) else (value,)) if isinstance(v, Tensor))


def _reader(holders: set[int]) -> str | None:
    """Return what calls a function of torch's now, if no call of a module of ``holders`` is under way.

    Nothing in backward passes and in compiled code.
    """
    reader, frame = "", sys._getframe(4)  # what has called torch's
    while frame is not None:
        code, caller = frame.f_code, frame.f_back
        module = _module(frame)
        if code.co_name == "_call_impl" and id(frame.f_locals.get("self")) in holders:
            return None
        if code.co_name == "backward" and code.co_varnames[:1] != ("self",):
            return None
        # What is not to be compiled, such as gradient checkpointing, passes through there too.
        if module.startswith("torch._dynamo.") and _module(caller) != "torch._compile":
            return None
        if not reader and not module.startswith("torch."):
            reader = code.co_name
        frame = caller  # type: ignore[assignment]
    return reader


def _module(frame: FrameType | None) -> str:
    return "" if frame is None else str(frame.f_globals.get("__name__", ""))
