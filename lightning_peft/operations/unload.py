"""Whether adapters can be merged for good, which ``merge(unload=True)`` does."""

from __future__ import annotations

from collections.abc import Container

from torch import nn

from lightning_peft.core.adapter import Adapter
from lightning_peft.core.registry import several_adapters
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.operations.merge import can_merge, weights_of, why_not


def refuse_unloading(model: ModelView) -> None:
    """Check that merging for good will leave a model whose state is that of one that is built anew.

    Raises:
        PEFTError: An adapter cannot be merged, adds a bias, or has a weight untied; or one is left over.
    """
    if names := several_adapters(model):
        raise _refusal(f"the model has several adapters, {', '.join(names)}", "Take one")
    shared = model.shared
    adapters = {name: (host, adapter) for name, host, slot in model.slots if (adapter := slot.active_adapter)}
    found = {name: _reason(name, host, adapter, shared) for name, (host, adapter) in adapters.items()}
    if reasons := {name: reason for name, reason in found.items() if reason}:
        others = [name for name in adapters if name not in reasons]
        first = "Take methods and modules that can be merged for good"
        advice = f"Leave out what cannot be merged for good, exclude_modules={list(reasons)!r}" if others else first
        raise _refusal(next(iter(reasons.values())), advice)


def _refusal(reason: str, advice: str) -> PEFTError:
    return PEFTError(
        f"merge_on_train_end='unload' was given, which leaves a plain module behind; but {reason}. {advice}, or leave "
        "out 'unload'."
    )


def _reason(name: str, host: nn.Module, adapter: Adapter, shared: Container[int]) -> str | None:
    """Return why merging ``adapter`` into its host, called ``name``, would leave another module than a plain one."""
    kind = type(adapter).__name__
    if adapter.adds_bias and host._parameters.get("bias") is None:
        return f"{kind} gives {name!r} a bias, for which a model that is built anew has no place"
    if not can_merge(host, adapter):
        why = why_not(host, adapter)
        return f"{kind} cannot be merged into a weight of {name!r}" + (f" ({why})" if why else "")
    if not adapter.follows_ties and any(id(weight) in shared for weight in weights_of(host, adapter)):
        return f"{name!r} shares its weight with another module, from which merging {kind} unties it"
    return None
