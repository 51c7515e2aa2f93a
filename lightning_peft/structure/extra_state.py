"""What modules write into a state that is neither parameter nor buffer: extra state, lists of metrics, what hooks add.

It is as small as it is seldom, and often no tensor, so checkpoints have all of it, changed or not, in a place of its
own.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from lightning_peft.core.adapter import clean_name
from lightning_peft.core.view import ModelView, once, own_state
from lightning_peft.errors import PEFTError
from lightning_peft.tensors.packed import is_packed


@once
def extra_state(model: ModelView) -> Mapping[str, dict[str, Any]]:
    """Return by the name of a module, and by key, what it writes itself beside parameters and buffers.

    What quantised layers write so are their weights, which are not the run's.
    """
    # Layers have few classes, which are looked at once.
    kinds = {kind for kind in {type(module) for _, module in model.walked} if _writes(kind)}
    writing = (
        (n, m) for n, m in model.walked if type(m) in kinds or any(map(_is_foreign, m._state_dict_hooks.values()))
    )
    found = {name: _extra(module) for name, module in writing if not is_packed(module)}
    return {name: extra for name, extra in found.items() if extra}


def by_name(extra: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return ``extra``, from :func:`extra_state`, by the names that it has in the state of the whole model."""
    return {f"{name}.{key}" if name else key: value for name, own in extra.items() for key, value in own.items()}


def load_extra_state(model: ModelView, extra: Mapping[str, Mapping[str, Any]], source: str) -> None:
    """Give the modules of ``model`` what :func:`extra_state` found in them, and nothing to those inside of them.

    Raises:
        PEFTError: ``model`` has not the module, or it does not take that.
    """
    for name, own in extra.items():
        module = model.part(name).module
        unexpected: list[str] = []
        errors: list[str] = []
        about = {"version": module._version}
        # What torch calls for every module: no public function loads one without those inside of it.
        module._load_from_state_dict(dict(own), "", about, True, [], unexpected, errors)
        if wrong := [*errors, *(f"it has no {key!r}" for key in unexpected)]:
            raise PEFTError(f"{source} does not fit the extra state of {name!r}: {wrong[0]}.")


def _writes(kind: type[nn.Module]) -> bool:
    """Whether modules of the class ``kind`` may write into their state what torch does not write for every module."""
    methods = (getattr(kind, name) for name in ("get_extra_state", "_save_to_state_dict", "state_dict"))
    return any(map(_is_foreign, methods))


def _is_foreign(function: Any) -> bool:
    """Whether ``function`` is not torch's, whose hooks only rename and gather."""
    function = function.func if isinstance(function, partial) else function
    return not str(getattr(function, "__module__", "")).startswith("torch.")


def _extra(module: nn.Module) -> dict[str, Any]:
    inside = {
        f"{name}.{key}" for name, child in module._modules.items() if child is not None for key in child.state_dict()
    }
    known = {*module._parameters, *module._buffers, *own_state(module), *inside}
    # Those are meant, too, to which a hook gives another name.
    tensors = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    state: dict[str, Any] = module.state_dict(keep_vars=True)
    return {clean_name(key): v for key, v in state.items() if key not in known and id(v) not in tensors}
