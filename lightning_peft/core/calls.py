"""The hidden state in what a module is called with, and in what it returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.errors import PEFTError


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the first argument of a call: the hidden state."""
    first: Tensor = args[0] if args else next(iter(kwargs.values()))
    return first


def with_input(args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments with ``value`` in place of the first one."""
    return ((value, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): value})


def on_hidden(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return ``output``, a tensor, a tuple, a list or a dataclass, with the hidden state (its first element) changed.

    Raises:
        PEFTError: ``output`` is none of these.
    """
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, tuple) and hasattr(output, "_replace"):
        return output._replace(**{output._fields[0]: change(output[0])})  # type: ignore[attr-defined]
    if isinstance(output, tuple | list):
        return type(output)([change(output[0]), *output[1:]])
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        first = dataclasses.fields(output)[0].name
        return dataclasses.replace(output, **{first: change(getattr(output, first))})
    raise PEFTError(
        f"An adapted module returned a {type(output).__name__}; a tensor, or a tuple or dataclass beginning with one, "
        "was expected. Adapt a module inside it."
    )


def hidden_of(output: Any) -> Tensor:
    """Return the hidden state in ``output``, as :func:`on_hidden` finds it."""
    found: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        found.append(hidden)
        return hidden

    on_hidden(output, keep)
    return found[0]


def on_rows(adapter: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    """Return what ``adapter`` makes of a nested ``output``: it is given the rows ``[tokens, features]`` of all texts.

    ``nn.TransformerEncoder`` makes nested tensors of padded texts in eval mode. Few operations take them.
    """
    given = input_of(args, kwargs)
    changed = adapter(*with_input(args, kwargs, torch.cat(given.unbind())), torch.cat(output.unbind()))
    return _nested(changed, output)


def on_rows_before(
    before: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments that ``before`` makes of these, of which the first is nested, as for :func:`on_rows`."""
    given = input_of(args, kwargs)
    args, kwargs = before(*with_input(args, kwargs, torch.cat(given.unbind())))
    return with_input(args, kwargs, _nested(input_of(args, kwargs), given))


def _nested(rows: Tensor, like: Tensor) -> Tensor:
    return torch.nested.as_nested_tensor(list(rows.split([len(part) for part in like.unbind()])))


@contextmanager
def recorded_inputs(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Give a dictionary that gets, within the context, the hidden state that each of ``modules`` is called with."""
    found: dict[str, Tensor] = {}

    def record(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found[name] = input_of(args, kwargs)

    with ExitStack() as stack:
        for name, module in modules.items():
            hook = module.register_forward_pre_hook(partial(record, name), with_kwargs=True)
            stack.callback(hook.remove)
        yield found


def add_scaled(output: Tensor, delta: Tensor, scale: float) -> Tensor:
    """Return ``output + scale · delta``.

    Compiled, the scale is a variable of the program, which then serves adapters of every scale: it can be one where a
    tensor is multiplied by it, as ``alpha`` it would be a constant.
    """
    if torch.compiler.is_compiling():
        return output + delta * scale
    return torch.add(output, delta, alpha=scale)
