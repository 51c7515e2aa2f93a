"""State dicts of a module as it is without adapters: with what they learnt, or without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_peft.core.adapter import CHILD, clean_name
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.operations.fold import merged_values, weight_names
from lightning_peft.storage.checkpoint import KEY, checkpoint_metadata
from lightning_peft.tensors.sharding import from_kept_part

_UNLOAD = "unload"
_BESIDE = "beside"


def unmerged_state_dict(state: dict[str, Any], model: ModelView) -> dict[str, Any]:
    """Return ``state``, the state dict of ``model``, by clean name and with the weights as they are without a merge."""
    state, names = {clean_name(name): tensor for name, tensor in state.items()}, _names(model)
    for _, host, slot in model.slots:
        merged = slot.merged or {}
        for name, value in merged.items():
            if isinstance(value, Tensor):
                parameter = host.get_parameter(name)
                state.update(dict.fromkeys(names[id(parameter)], from_kept_part(parameter, value.detach())))
        for alias in names[id(host.get_parameter("bias"))] if merged.get("added_bias") else ():
            del state[alias]
    return state


def leave_plain(checkpoint: dict[str, Any], model: ModelView, full: bool) -> None:
    """Have a finished ``checkpoint`` say that its run leaves a plain module behind.

    If it holds the base, ``state_dict`` becomes what that module will load: merged weights. What they were made of gets
    a place of its own, from where :func:`with_adapters` takes it.
    """
    checkpoint[KEY][_UNLOAD] = True
    if not full:
        return
    state, names = dict(checkpoint["state_dict"]), _names(model)
    beside = {name: state.pop(name) for name in list(state) if CHILD in name.split(".")}
    for host_name, host, slot in model.slots:
        if (adapter := slot.active_adapter) is None:
            continue
        wanted = {*weight_names(adapter), "bias"}
        own = {name: names[id(parameter)] for name, parameter in host.named_parameters() if name in wanted}
        if not adapter.follows_ties:
            # Merging it unties a weight that was tied in the run.
            own = {name: [a for a in every if _is_in(model, a, host_name, name)] for name, every in own.items()}
        if any(alias in beside for aliases in own.values() for alias in aliases):
            continue  # The second of two hosts of one weight.
        values = {name: state[aliases[0]] for name, aliases in own.items()}
        for name, value in merged_values(host, adapter, values, host_name)[0].items():
            beside.update({alias: state[alias] for alias in own[name]})
            state.update(dict.fromkeys(own[name], value))
    names_of_torch = {clean_name(name): name for name in model.module.state_dict()}
    checkpoint["state_dict"] = {names_of_torch.get(name, name): tensor for name, tensor in state.items()}
    checkpoint[KEY][_BESIDE] = beside


def with_adapters(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return ``checkpoint`` as it was before :func:`leave_plain`."""
    if not is_plain(checkpoint):
        return checkpoint
    state = {clean_name(name): tensor for name, tensor in checkpoint["state_dict"].items()}
    saved = {key: value for key, value in checkpoint[KEY].items() if key != _BESIDE}
    return {**checkpoint, "state_dict": {**state, **checkpoint[KEY][_BESIDE]}, KEY: saved}


def is_plain(checkpoint: Mapping[str, Any]) -> bool:
    """Whether the ``state_dict`` of ``checkpoint`` is that of a plain module, with the adapters beside it."""
    saved = checkpoint.get(KEY)
    return isinstance(saved, Mapping) and _BESIDE in saved


def leaves_plain(checkpoint: Mapping[str, Any]) -> bool:
    """Whether the run that wrote ``checkpoint`` leaves a plain module behind."""
    return _UNLOAD in checkpoint_metadata(checkpoint)


def refuse_directory() -> None:
    """Raise :class:`PEFTError`, since a directory was asked for of a module whose adapters are gone."""
    raise PEFTError(
        "An adapter directory was asked for after the adapters were merged for good (merge_on_train_end='unload'). "
        "AdapterCheckpoint writes them during the run; trainer.save_checkpoint without it writes the plain module."
    )


def _is_in(model: ModelView, name: str, host: str, parameter: str) -> bool:
    """Whether ``name`` is one of those of ``parameter`` of the module ``host``."""
    owner, _, leaf = name.rpartition(".")
    return f"{model.aliases.get(owner, owner)}.{leaf}".lstrip(".") == f"{host}.{parameter}".lstrip(".")


def _names(model: ModelView) -> dict[int, list[str]]:
    """Return the clean names of each tensor in the state of ``model``, by id: a module may have several places."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.module.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(clean_name(name))
    return names
