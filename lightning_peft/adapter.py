"""Adapters and how they hang on a model: a child module, called from its host's own forward hook.

The host keeps its class, its object, its parameters and their names. This is the only file that knows hooks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.errors import PEFTError

CHILD = "peft"
"""Name under which a slot becomes a child of its host: ``q_proj.peft.default.lora_A``."""

# What wrappers put into module names. They are not part of what the user's model calls its modules.
_WRAPPER_SEGMENTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})

_NARROW = (torch.float16, torch.bfloat16)


class Adapter(nn.Module):
    """Base of all adapter modules.

    Subclasses hold bare parameters (no ``nn.Linear`` inside, no parameter name that ends in ``weight``: both are
    taken for the base's by quantising plugins) and are always called through ``adapter(...)``, so that hooks of
    sharding wrappers fire.
    """

    mergeable: bool = False
    """Whether :meth:`fold` gives a weight with the same effect as the adapter."""
    axes: ClassVar[dict[str, tuple[str | None, ...]]] = {}
    """Which dimension of a parameter runs over the host's ``"in"`` or ``"out"`` features, for hosts that are split."""

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return what the host should return instead of ``output``.

        Args:
            base: The adapted module.
            args: Positional arguments of its call.
            kwargs: Keyword arguments of its call.
            output: What its own forward returned.
        """
        raise TypeError(f"{type(self).__name__} does not define forward")

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the weight ``[out, in]`` and bias ``[out]`` that make the adapter superfluous.

        Raises:
            PEFTError: The adapter is no change of weights.
        """
        raise PEFTError(f"{type(self).__name__} cannot be merged into weights: it is not a change of weights.")

    def reset_parameters(self) -> None:
        """Set the initial values, the same on every call and on every rank."""
        raise TypeError(f"{type(self).__name__} does not define reset_parameters")

    def _apply(self, fn: Any, recurse: bool = True) -> Adapter:
        # `module.to(torch.bfloat16)` reaches the adapters at every `setup` under `precision="bf16-true"`. They stay
        # float32: an optimizer step of 1e-4 is lost in bfloat16, and the values trained so far would be rounded.
        def keep_precision(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            if moved.dtype in _NARROW and tensor.dtype not in _NARROW and tensor.is_floating_point():
                return tensor.to(device=moved.device)
            return moved

        super()._apply(keep_precision, recurse)
        return self


class Slot(nn.ModuleDict):
    """The adapters of one host by name, of which one is active."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.active = ""
        self.merged: dict[str, Any] | None = None
        """While merged: what :mod:`lightning_peft.merge` needs to restore the weights."""
        self.hook(host)

    def hook(self, host: nn.Module) -> None:
        """Have ``host`` call the active adapter."""
        # First of all hooks: beside a layer that tensor parallelism has split, the next one gathers the output.
        self._handle = host.register_forward_hook(self._run, with_kwargs=True, prepend=True)

    def _run(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self.merged is not None or self.active not in self._modules:
            return output
        return self[self.active](base, args, kwargs, output)

    @property
    def active_adapter(self) -> Adapter | None:
        """The adapter that runs, if this host has one of that name."""
        adapter = self._modules.get(self.active)
        return adapter if isinstance(adapter, Adapter) else None

    def remove_hook(self) -> None:
        """Take the forward hook off the host."""
        self._handle.remove()


def attach(host: nn.Module, name: str, adapter: Adapter) -> None:
    """Hang ``adapter`` on ``host`` under ``name``; the first one becomes active."""
    slot = host._modules.get(CHILD)
    if not isinstance(slot, Slot):
        slot = Slot(host)
        host.add_module(CHILD, slot)
    slot[name] = adapter
    slot.active = slot.active or name


def detach(host: nn.Module) -> None:
    """Take every adapter off ``host``."""
    slot = host._modules[CHILD]
    assert isinstance(slot, Slot)
    slot.remove_hook()
    delattr(host, CHILD)


def restore_hooks(model: nn.Module) -> None:
    """Hook every host again, after someone deleted all forward hooks of ``model``."""
    for _, host, slot in slots(model):
        slot.remove_hook()
        slot.hook(host)


def slots(model: nn.Module) -> Iterator[tuple[str, nn.Module, Slot]]:
    """Yield ``(name of the host, host, slot)`` for every adapted module, in the order of ``named_modules``."""
    for name, module in model.named_modules():
        slot = module._modules.get(CHILD)
        if isinstance(slot, Slot):
            yield clean_name(name), module, slot


def clean_name(name: str) -> str:
    """Drop what wrappers (``torch.compile``, FSDP, activation checkpointing) put into a module's name."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_SEGMENTS)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's module behind ``torch.compile``."""
    inner = model._modules.get("_orig_mod")
    return model if inner is None else inner


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter of every adapter, by its name in ``model``."""
    found: dict[str, nn.Parameter] = {}
    for host_name, _, slot in slots(model):
        prefix = f"{host_name}.{CHILD}" if host_name else CHILD
        found.update({f"{prefix}.{clean_name(name)}": p for name, p in slot.named_parameters()})
    return found
