"""Adapter state: what a checkpoint has to hold, whether it fits, and loading it. In memory only: no files here."""

from __future__ import annotations

import difflib
import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.adapter import CHILD
from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.refusals import refuse_merged
from lightning_peft.core.registry import changed, required, trained_whole
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError, listed
from lightning_peft.operations.shards import resharded
from lightning_peft.storage.fingerprint import describe_base, refuse_other_base
from lightning_peft.tensors.sharding import from_kept_part, full_shape, in_zero_pieces, replace, whole

_VERSION = 1


def adapter_parameters_and_whole(model: ModelView) -> dict[str, Tensor]:
    """Return every tensor that belongs to adapters: theirs, and those of the base trained whole, by clean name.

    An adapter's tensors are its parameters and its persistent buffers.
    """
    return {**model.adapter_tensors, **{name: tensor for name, tensor, _ in trained_whole(model)}}


def saved_tensors(model: ModelView) -> dict[str, Tensor]:
    """Return every tensor of which a checkpoint has the value: those above, and what else has changed of the base."""
    return {**adapter_parameters_and_whole(model), **{name: tensor for name, tensor, _ in changed(model)}}


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapter state of ``model``: a part of its ``state_dict()``, with the same names and tensors.

    It holds every adapter's tensors, the parameters of the base that are trained whole, as they are without a merge,
    and the base's persistent buffers that have changed since the injection. The tensors share memory with these. Of a
    model that is in pieces on several processes they are pieces too (DTensors), or whole copies under ZeRO-3, where
    each process has to call this.

    Raises:
        PEFTError: There are no adapters.
    """
    return adapter_state(resharded(model))


def adapter_state(model: ModelView) -> dict[str, Tensor]:
    """Return what :func:`adapter_state_dict` does.

    Raises:
        PEFTError: As there.
    """
    required(model)
    parameters = saved_tensors(model)
    state = {name: whole(p) if in_zero_pieces(p) else p.detach() for name, p in parameters.items()}
    state.update({name: value for name, value in values_before_merge(model).items() if name in state})
    return state


def values_before_merge(model: ModelView) -> dict[str, Tensor]:
    """Return what merging replaced in the base's parameters, by clean name."""
    return {
        f"{name}.{parameter}" if name else parameter: from_kept_part(host.get_parameter(parameter), value.detach())
        for name, host, slot in model.slots
        for parameter, value in (slot.merged or {}).items()
        if isinstance(value, Tensor)
    }


def load_adapter_state_dict(model: ModelView, state: Mapping[str, Tensor], source: str = "The adapter state") -> None:
    """Copy ``state``, adapters and what is trained whole, into ``model``.

    Args:
        model: A model with the same adapters, not merged.
        state: Tensors by name.
        source: What to call it in errors.

    Raises:
        PEFTError: A tensor is missing, superfluous, of another shape, or holds NaN; nothing was copied.
    """
    refuse_merged(model, "load adapters")
    required(model)
    parameters = adapter_parameters_and_whole(model)
    check_tensors(parameters, state, source)
    for name, parameter in parameters.items():
        replace(parameter, state[name])


_PACKED = getattr(torch, "float4_e2m1fn_x2", torch.bits8)
"""Two values in each element, which torch makes no other numbers of."""


def check_tensors(targets: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str) -> None:
    """Check that ``state`` holds exactly what is to be copied to ``targets``, all finite but for buffers of the base.

    Raises:
        PEFTError: It does not; the message names the tensors.
    """
    missing, extra = sorted(targets.keys() - state.keys()), sorted(state.keys() - targets.keys())
    if missing or extra:
        near = difflib.get_close_matches(missing[0], extra, n=1) if missing else []
        added = [name for name in extra if CHILD not in name.split(".")]
        raise PEFTError(
            f"{source} does not fit this model's adapters."
            + (f" Missing: {listed(missing)}." if missing else "")
            + (f" Superfluous: {listed(extra)}." if extra else "")
            + (f" Is {near[0]!r} meant for {missing[0]!r}?" if near else "")
            + (
                f" The model had {added[0]!r} when it was written: make it in __init__ or configure_model."
                if added
                else ""
            )
            + " Use the method and the targets that it was written with."
        )
    for name, target in targets.items():
        if not isinstance(state[name], Tensor):
            raise PEFTError(f"{source}: {name} is a {type(state[name]).__name__}, no tensor. It is damaged.")
        if state[name].shape != full_shape(target):
            raise PEFTError(
                f"{source}: {name} has shape {list(state[name].shape)}, this model's has {list(full_shape(target))}. "
                "Use the rank and the base model that it was written with."
            )
        if state[name].is_floating_point() != target.is_floating_point() or state[name].dtype == _PACKED:
            raise PEFTError(
                f"{source}: {name} has the dtype {state[name].dtype}, this model's has {target.dtype}. It is damaged."
            )
        trained = isinstance(target, nn.Parameter) or CHILD in name.split(".")
        # One pass instead of three: files have hundreds of small tensors.
        if trained and not math.isfinite(state[name].to(target.dtype).sum(dtype=torch.float64)):
            raise PEFTError(
                f"{source}: {name} holds NaN or infinity, or values that {target.dtype} cannot hold. Take an earlier "
                "checkpoint."
            )


def metadata(model: ModelView) -> dict[str, Any]:
    """Return what tells adapter states apart: methods, modules trained whole, and the base; plain types only."""
    return {
        "version": _VERSION,
        "injections": {
            prefix: {
                "adapters": {name: [m.config() for m in methods] for name, methods in registry.methods.items()},
                "active": registry.active,
                "train_also": list(registry.train_also),
                "moved": sorted(registry.moved),
                "frozen": list(registry.frozen),
                "base": describe_base(model, prefix),
            }
            for prefix, _, registry in required(model)
        },
    }


def check_metadata(model: ModelView, saved: Mapping[str, Any], source: str, held: Container[str] = ()) -> None:
    """Check that ``saved``, from :func:`metadata`, is about a model with the same base and methods.

    Of the base what counts is what is not ``held``, names of tensors that are loaded as well.

    Raises:
        PEFTError: It is not; what differs is named.
    """
    if saved.get("version") != _VERSION:
        raise PEFTError(
            f"{source} has format version {saved.get('version')!r}; this lightning_peft reads {_VERSION}. Update it."
        )
    found = required(model)
    theirs = sorted(prefix for prefix, injection in saved["injections"].items() if injection["adapters"])
    if (ours := sorted(prefix for prefix, _, registry in found if registry.methods)) != theirs:
        places = ["the module itself" if names == [""] else listed(map(repr, names)) for names in (theirs, ours)]
        raise PEFTError(
            f"{source} has adapters that were injected into {places[0]}; here they were injected into {places[1]}. "
            "Before the run, inject into the same parts."
        )
    for prefix, _, registry in found:
        injection = saved["injections"].get(prefix)
        where = f" in {prefix!r}" if prefix else ""
        if injection is None:
            # An older version left the rest of the model alone.
            continue
        if list(injection["train_also"]) != list(registry.train_also):
            raise PEFTError(
                f"{source} was written with train_also={list(injection['train_also'])}{where}; this model has "
                f"{list(registry.train_also)}. Train the same modules whole."
            )
        if injection["adapters"].keys() != registry.methods.keys():
            raise PEFTError(
                f"{source} holds the adapters {sorted(injection['adapters'])}{where}; this model has "
                f"{sorted(registry.methods)}."
            )
        for name, methods in registry.methods.items():
            refuse_other_methods(methods, injection["adapters"][name], source)
        refuse_other_base(model, injection["base"], source, prefix, held)


def refuse_other_methods(
    methods: Sequence[PEFTMethod], saved: Sequence[Mapping[str, Any]], source: str, names_only: bool = False
) -> None:
    """Check that ``saved``, configurations of methods, are those of ``methods``; only their names, if so asked.

    Raises:
        PEFTError: They are not.
    """
    saved_names, present = [str(config.get("method")) for config in saved], [method.name for method in methods]
    if names_only:  # then the tensors' names tell whose they are, in whatever order the methods were given
        saved_names, present = sorted(saved_names), sorted(present)
    theirs, ours = " + ".join(saved_names), " + ".join(present)
    if theirs != ours:
        raise PEFTError(
            f"{source} was written with method {theirs!r}; this model has {ours!r}. Use the method that it was written "
            "with."
        )
    for method, config in [] if names_only else zip(methods, saved, strict=True):
        _refuse_other_config(method, config, source)


def _refuse_other_config(method: PEFTMethod, saved: Mapping[str, Any], source: str) -> None:
    present = method.config()
    differing = [key for key in present if key not in method.free and saved.get(key) != present[key]]
    if differing:
        both = ", ".join(f"{key}={saved.get(key)!r} (here {present[key]!r})" for key in differing)
        raise PEFTError(f"{source} was written with {both}. Use the hyper-parameters that it was written with.")
