"""What ``state_dict()`` and ``load_state_dict()`` mean, called by hand on a model with adapters.

A state says what a model computes, and loading one changes values, not what the model is. While adapters are merged,
the state is that of a plain model, which loads it: weights that hold the adapters' effect, and no adapters. A state
with adapters goes into a merged model as well, which stays merged, and one without them is refused where the outputs
would not be its own. Adapter state alone is whole: frozen weights are never asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.adapter import CHILD, Adapter, Slot, clean_name
from lightning_peft.core.registry import Registry, changed, trained_whole
from lightning_peft.core.view import ModelView
from lightning_peft.errors import NotFiniteError, PEFTError
from lightning_peft.operations.fold import fold_into, has_effect, restore, weight_names
from lightning_peft.tensors.packed import is_packed
from lightning_peft.tensors.sharding import in_flat_pieces, whole, write
from lightning_peft.tensors.weights import is_same

State = dict[str, Any]


def watch(root: nn.Module, registry: Registry, hosts: Iterable[nn.Module]) -> None:
    """Have torch ask here when a state of ``root``, or of any of ``hosts`` in it, is made or loaded.

    It can be called again, when there are more of them or someone has deleted their hooks.
    """
    unwatch(registry)
    registry.hooks = (root.register_load_state_dict_pre_hook(_before_loading_root),)
    for host in hosts:
        slot = host._modules[CHILD]
        assert isinstance(slot, Slot)
        slot.remove_hooks_of_state()
        # One at a time: what is registered when an interrupt comes is known, and can be removed.
        slot.of_state = (host.register_load_state_dict_pre_hook(_before_loading_host),)
        slot.of_state += (slot.register_state_dict_post_hook(_after_saving),)  # type: ignore[no-untyped-call]


def unwatch(registry: Registry) -> None:
    """Have torch no longer ask for the root; a host's hooks go with its adapters."""
    for handle in registry.hooks:
        handle.remove()
    registry.hooks = ()


def _after_saving(slot: nn.Module, state: State, prefix: str, local_metadata: Any) -> None:
    """Leave adapters out that are in the weights."""
    if isinstance(slot, Slot) and slot.merged is not None:
        for key in [key for key in state if key.startswith(prefix)]:
            del state[key]


def _before_loading_root(root: nn.Module, state: State, prefix: str, *_: Any) -> None:
    """Complete adapter state, whose names are clean and name what adapters share once."""
    _refuse_untied(root, state, prefix)
    view = ModelView(root)
    trained = {**view.adapter_tensors, **{name: tensor for name, tensor, _ in trained_whole(view)}}
    others = list(changed(view))
    known = {**view.buffers, **{name: tensor for name, tensor, _ in others}, **trained}
    given = {clean_name(key.removeprefix(prefix)): value for key, value in state.items()}
    if not given.keys() & trained.keys() or given.keys() - known.keys():
        return
    # What it leaves out of buffers has not changed where it comes from.
    given = {**{name: before for name, _, before in others if before is not None}, **given}
    values = {id(known[name]): value for name, value in given.items()}
    # What of trained tensors lacks is an error, and merged weights are worked out host by host.
    left_out = {id(tensor) for tensor in trained.values()}
    merged = [(host, slot) for _, host, slot in view.slots if slot.merged is not None]
    left_out |= {id(host.get_parameter(name)) for host, slot in merged for name in _changed(host, slot)}
    state.clear()
    for name, tensor in _tensors(root).items():
        # Metrics give copies of their state.
        value = values.get(id(tensor), given.get(clean_name(name)))
        if value is not None:
            state[prefix + name] = value
        elif id(tensor) not in left_out:
            # Lists of a metric and extra state are no tensors.
            state[prefix + name] = tensor.detach() if isinstance(tensor, Tensor) else tensor


def _refuse_untied(root: nn.Module, state: State, prefix: str) -> None:
    """Check that ``state`` has one value for what is one tensor: a merge may have untied it where that was made.

    Raises:
        PEFTError: It has several; torch would take the last.
    """
    first: dict[int, str] = {}
    for name, tensor in _tensors_of(root).items():
        if (key := prefix + name) in state:
            other = first.setdefault(id(tensor), key)
            if other != key and not _is_equal(state[key], state[other]):
                raise PEFTError(
                    f"The state has one value for {other!r} and another for {key!r}, which are one weight here. It is "
                    "that of a model in which a merge has untied them: untie them here as well, or merge the adapter "
                    "here."
                )


def _tensors(root: nn.Module) -> State:
    """Return what the state of ``root`` would hold if nothing was merged, with torch's names for it."""
    found = _tensors_of(root)
    for name, module in root.named_modules(remove_duplicate=False):
        if isinstance(module, Slot):
            found.update({f"{name}.{key}": tensor for key, tensor in module.tensors().items()})
    return found


def _tensors_of(root: nn.Module) -> State:
    """Return the state of ``root`` by torch's names, by which it is loaded: one of its own may have others."""
    state: State = nn.Module.state_dict(root, keep_vars=True)
    return state


@torch.no_grad()
def _before_loading_host(host: nn.Module, state: State, prefix: str, *_: Any) -> None:
    slot = host._modules.get(CHILD)
    assert isinstance(slot, Slot)
    with_adapters = any(key.startswith(f"{prefix}{CHILD}.") for key in state)
    if with_adapters:
        if slot.merged is not None:
            _into_merged(host, slot, state, prefix)
    elif any(prefix + name in state for name in _changed(host, slot)):
        _refuse_plain(host, slot, state, prefix)
        # Adapters without an effect, or in the weights: what they hold does not count.
        state.update({f"{prefix}{CHILD}.{key}": tensor.detach() for key, tensor in slot.tensors().items()})


def _changed(host: nn.Module, slot: Slot) -> list[str]:
    """Return the parameters of ``host`` that a merge changes or, if there was one, has changed."""
    if slot.merged is None:
        return sorted({name for _, adapter in _mergeable(host, slot) for name in weight_names(adapter)})
    added = ["bias"] if slot.merged.get("added_bias") else []
    return [name for name, old in slot.merged.items() if isinstance(old, Tensor)] + added


def _mergeable(host: nn.Module, slot: Slot) -> list[tuple[str, Adapter]]:
    adapters = [(name, adapter) for name, adapter in slot.items() if isinstance(adapter, Adapter)]
    merge = [(name, adapter) for name, adapter in adapters if adapter.mergeable and not is_packed(host)]
    own = dict(host.named_parameters()).keys()
    return [(name, adapter) for name, adapter in merge if own >= set(weight_names(adapter))]


def _into_merged(host: nn.Module, slot: Slot, state: State, prefix: str) -> None:
    """Merge anew what ``state`` has for ``host``; torch then copies the outcome onto itself."""
    merged, adapter = slot.merged, slot.active_adapter
    assert merged is not None
    assert adapter is not None
    weights = weight_names(adapter)
    if any(in_flat_pieces(host.get_parameter(name)) for name in weights):
        raise PEFTError(
            f"{_name(prefix)} has an adapter merged into a weight of which each process holds a piece, so no other can "
            "be loaded into it by hand. Call unmerge(model) first, or load a checkpoint by the Trainer's ckpt_path."
        )
    untied = [name for name, old in merged.items() if isinstance(old, nn.Parameter)]
    restore(host, merged)
    bias = [] if host._parameters.get("bias") is None else ["bias"]
    own = {name: host.get_parameter(name) for name in (*weights, *bias)}
    for name, tensor in {**own, **{f"{CHILD}.{key}": tensor for key, tensor in slot.tensors().items()}}.items():
        value = state.get(prefix + name)
        # Another shape is an error, which torch reports.
        if isinstance(value, Tensor) and value.shape == tensor.shape:
            write(tensor, whole(value))
    host_name = clean_name(prefix.rstrip("."))
    tied = merged["tied"]

    def note(again: dict[str, Any]) -> None:
        # In place: hosts of one weight share it.
        merged.clear()
        merged.update(again, tied=tied)

    try:
        fold_into(host_name, host, adapter, {id(own[name]) for name in untied}, True, note)
    except NotFiniteError:
        slot.merged = None  # what was loaded is there, beside the weight
        raise
    state.update({prefix + name: host.get_parameter(name).detach() for name in _changed(host, slot)})


def _refuse_plain(host: nn.Module, slot: Slot, state: State, prefix: str) -> None:
    """Check that ``state``, which has no adapters for ``host``, gives its own outputs there.

    Raises:
        PEFTError: It has weights other than those that adapters are merged into, or adapters have an effect on them.
    """
    if slot.merged is not None:
        if any(not _is_equal(state.get(prefix + name), host.get_parameter(name)) for name in _changed(host, slot)):
            raise PEFTError(
                f"The state has a weight for {_name(prefix)} and no adapters. Here an adapter is merged into the "
                "weight, which the state's would replace. Make this a plain model first: call eject(model), or "
                "merge(model, unload=True)."
            )
        return
    own = {name: state.get(prefix + name) for name, _ in host.named_parameters()}
    given = {n: v for n, v in own.items() if isinstance(v, Tensor) and v.shape == host.get_parameter(n).shape}
    if trained := [name for name, adapter in _mergeable(host, slot) if has_effect(host, adapter, given)]:
        raise PEFTError(
            f"The state has a weight for {_name(prefix)} and no adapters. Here the adapter {trained[0]!r} would change "
            "what it computes. Load the base's weights before there are adapters, or call eject(model) first."
        )


def _is_equal(value: Any, present: Any) -> bool:
    if not isinstance(value, Tensor) or not isinstance(present, Tensor):
        return value is None
    value, present = whole(value), whole(present)
    return value.shape == present.shape and is_same(value.to(present), present)


def _name(prefix: str) -> str:
    return repr(clean_name(prefix.rstrip("."))) if prefix else "the module"
