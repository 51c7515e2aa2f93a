"""Which adapters can be merged, and which for good, as ``merge(unload=True)`` does."""

from __future__ import annotations

from collections.abc import Container, Iterable

from torch import nn

from lightning_peft.core.adapter import Adapter, is_overtaken
from lightning_peft.core.registry import several_adapters
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.operations.fold import weight_names
from lightning_peft.operations.shards import in_pieces
from lightning_peft.structure.kept import why_kept
from lightning_peft.structure.plain import is_plain_no_more
from lightning_peft.tensors.packed import is_packed
from lightning_peft.tensors.weights import is_complex, weight_of


def can_merge(host: nn.Module, adapter: Adapter) -> bool:
    """Whether ``adapter`` can be folded into a weight of ``host``, which may be in pieces."""
    # A weight may have been packed, or become one that is worked out from others, since the injection.
    if not adapter.mergeable or is_packed(host) or not _has_weights(host, adapter) or is_overtaken(host):
        return False
    if not adapter.replaces and is_plain_no_more(host):
        return False
    # A parameter that comes new into a sharded module belongs to no shard.
    adds_bias = adapter.adds_bias and host._parameters.get("bias") is None
    return not (adds_bias and in_pieces(host))


def why_not(host: nn.Module, adapter: Adapter) -> str | None:
    """Return why ``adapter`` cannot be merged into ``host``, if it is not for what it is itself."""
    if is_overtaken(host):
        return "a forward hook of others runs between the module and the adapter, or in place of the adapter's"
    return why_kept(host, adapter)


def weights_of(host: nn.Module, adapter: Adapter) -> list[nn.Parameter]:
    """Return the parameters of ``host`` that merging ``adapter`` changes."""
    return [host.get_parameter(name) for name in weight_names(adapter)]


def refuse_ties(model: ModelView) -> None:
    """Raise :class:`PEFTError` if merging would have to untie a weight, which cannot be done when it is in pieces."""
    shared = model.shared
    for name, host, slot in model.slots:
        adapter = slot.active_adapter
        if adapter is None or adapter.follows_ties or not can_merge(host, adapter):
            continue
        if any(id(weight) in shared for weight in weights_of(host, adapter)):
            raise PEFTError(
                f"{name!r} is adapted and shares its weight with another module. A sharded weight cannot be untied to "
                "merge the adapter: leave the module out with exclude_modules, or set merge_on_train_end=False."
            )


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


def not_unloaded(name: str, host: nn.Module, adapter: Adapter) -> str:
    """Return the message for an adapter of ``host`` that cannot be merged and would be lost."""
    reason = why_not(host, adapter)
    why = f" ({reason})" if reason else ""
    advice = (
        "; or load the adapter into the model as it was before it was quantised, or make the layers float ones with "
        "merge(model, unload=True, dequantize=True)"
        if is_packed(host) and not is_complex(host)
        else ""
    )
    return (
        f"merge(unload=True): the adapter of {name!r} cannot be merged{why}, so removing it would change the "
        f"model's outputs. Call merge(model) to merge the others, or eject(model) to remove them all{advice}."
    )


def refuse_pieces(hosts: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise :class:`PEFTError` if a weight is in pieces that nobody here puts together."""
    for name, host in hosts:
        if in_pieces(host):
            continue
        if isinstance(host, nn.Linear) and weight_of(host).shape != (host.out_features, host.in_features):
            raise PEFTError(
                f"The weight of {name!r} is in pieces on several processes ({list(weight_of(host).shape)} here), so it "
                "cannot be merged into. Leave the sharding to PEFTStrategy, or load the adapter into the base model in "
                "one process and merge there."
            )


def _has_weights(host: nn.Module, adapter: Adapter) -> bool:
    return set(weight_names(adapter)) <= dict(host.named_parameters()).keys()
