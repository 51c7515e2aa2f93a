"""A checkpoint that has been through ``on_load_checkpoint``, at which a module has no adapters yet.

Such hooks keep what the module has a place for, or give what has an old name its new one. Nothing is lost by that, and
all that a checkpoint says by name has the new names too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lightning_peft.core.adapter import CHILD
from lightning_peft.storage.checkpoint import EXTRA, KEY, checkpoint_metadata

_BY_NAME = ("_modules", "_pattern")
"""What the names of hyper-parameters end in whose values are names of modules, or have them for keys."""


def follow(checkpoint: dict[str, Any], read: Mapping[str, Any]) -> None:
    """Make ``checkpoint`` what its hooks would have made of it, had the module its adapters.

    Args:
        checkpoint: As hooks left it.
        read: Its state as it was before.

    Raises:
        PEFTError: It is damaged.
    """
    state = checkpoint["state_dict"]
    # Other values may be one object in several places, as tied weights are: then it is no new name.
    now = {id(tensor): name for name, tensor in state.items() if isinstance(tensor, Tensor)}
    renamed = {name: now[id(t)] for name, t in read.items() if name not in state and id(t) in now}
    parts = [_parts(old, new) for old, new in renamed.items() if new not in read]
    rename = _renaming(dict(parts))
    taken_out = {
        name: tensor
        for name, tensor in read.items()
        if CHILD in name.split(".") and name not in state and now.get(id(tensor), name) in read
    }
    checkpoint["state_dict"] = {**{rename(name): tensor for name, tensor in taken_out.items()}, **state}
    if parts:
        _rename(checkpoint, rename)


def _parts(old: str, new: str) -> tuple[str, str]:
    """Return what of two names of one tensor is not the same: the names of the outermost parts that differ."""
    before, after = old.split("."), new.split(".")
    while min(len(before), len(after)) > 1 and before[-1] == after[-1]:
        del before[-1], after[-1]
    return ".".join(before), ".".join(after)


def _renaming(parts: Mapping[str, str]) -> Callable[[str], str]:
    """Return what gives a name that is or begins with one of ``parts`` the new one; of several, the longest."""

    def rename(name: str) -> str:
        around = name
        while around and around not in parts:
            around = around.rpartition(".")[0]
        return f"{parts[around]}{name[len(around) :]}".lstrip(".") if around else name

    return rename


def _rename(checkpoint: dict[str, Any], rename: Callable[[str], str]) -> None:
    """Give everything beside the state of ``checkpoint`` that goes by name its new name."""
    saved = checkpoint_metadata(checkpoint)
    injections = {rename(prefix): _injection(prefix, found, rename) for prefix, found in saved["injections"].items()}
    extra = {rename(name): own for name, own in saved.get(EXTRA, {}).items()}
    checkpoint[KEY] = {**saved, "injections": injections, EXTRA: extra}
    if "optimizer_states" in checkpoint:
        checkpoint["optimizer_states"] = [_optimizer(saved, rename) for saved in checkpoint["optimizer_states"]]


def _injection(prefix: str, saved: Mapping[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    lead, new_lead = (f"{name}." if name else "" for name in (prefix, rename(prefix)))

    def inside(name: str) -> str:
        return rename(lead + name).removeprefix(new_lead)

    listed = {key: [inside(name) for name in saved[key]] for key in ("train_also", "moved", "frozen") if key in saved}
    base = {key: _keys(value, inside) for key, value in saved["base"].items()}
    adapters = {
        adapter: [{k: _values(v, inside) if k.endswith(_BY_NAME) else v for k, v in config.items()} for config in found]
        for adapter, found in saved["adapters"].items()
    }
    return {**saved, **listed, "base": base, "adapters": adapters}


def _keys(value: Any, rename: Callable[[str], str]) -> Any:
    return {rename(name): found for name, found in value.items()} if isinstance(value, Mapping) else value


def _values(value: Any, rename: Callable[[str], str]) -> Any:
    """Return patterns by name; a regular expression, a string by itself, is none."""
    return [rename(name) for name in value] if isinstance(value, list | tuple) else _keys(value, rename)


def _optimizer(saved: Mapping[str, Any], rename: Callable[[str], str]) -> Mapping[str, Any]:
    if "param_groups" not in saved:
        return saved
    state = {rename(key) if isinstance(key, str) else key: entry for key, entry in saved["state"].items()}
    names = ("params", "param_names")
    groups = [
        {key: [rename(name) for name in value] if key in names else value for key, value in group.items()}
        for group in saved["param_groups"]
    ]
    return {**saved, "state": state, "param_groups": groups}
