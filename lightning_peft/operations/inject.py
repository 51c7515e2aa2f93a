"""Put adapters into a model and switch between them. Everything is checked before anything changes."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from lightning_peft.core.adapter import CHILD, Slot, attach, clean_name, detach
from lightning_peft.core.method import PEFTMethod, methods_of
from lightning_peft.core.refusals import refuse_foreign_adapters, refuse_lazy, refuse_merged, refuse_stand_in
from lightning_peft.core.registry import Registry, drop, keep, own_registry, refuse_part, registries, required
from lightning_peft.core.to_the_end import to_the_end
from lightning_peft.core.view import ModelView, is_inside
from lightning_peft.errors import PEFTError
from lightning_peft.operations.by_hand import unwatch, watch
from lightning_peft.operations.prepare import Prepared, changing_tensors, parameter_names, prepare, whole_names
from lightning_peft.operations.shards import resharded
from lightning_peft.structure.frozen import frozen_apart
from lightning_peft.tensors.sharding import host_copy

_TRAINED_ITSELF = (
    "A module or parameter of the model that is trained itself belongs to one adapter: train_also and methods that "
    "train parameters of the model cannot be combined with several adapters in one model. Call eject(model) first, or "
    "inject without it."
)

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


def inject(
    model: nn.Module,
    method: PEFTMethod | Sequence[PEFTMethod],
    *,
    name: str = "default",
    train_also: Sequence[str] = (),
    seed: int | None = None,
    allow_sharded: bool = False,
) -> list[str]:
    """Freeze ``model`` and attach the adapters of ``method`` to it; the first adapter injected becomes active.

    Base parameters keep their names, the host modules their class and identity, and the outputs are bit for bit
    those of the base model for every method that starts as the identity. Injecting the same method under the same
    name again does nothing.

    Args:
        model: Any module. One that was compiled is compiled anew at its next call.
        method: What to inject, for example ``LoRA(r=8)``; several methods make one adapter together.
        name: Name of this adapter.
        train_also: Patterns of modules to train whole and to save with the adapter, such as a classification head, or
            of parameters that stand by themselves, such as a temperature.
        seed: Seed of the initial values; ``torch.initial_seed()`` if not given.
        allow_sharded: Accept a model whose parameters are sharded (DTensor). The caller then has to keep the adapters
            equal between processes, as ``PEFTStrategy`` does.

    Returns:
        The names of the adapted modules, then those of the base's parameters that the method trains.

    Raises:
        PEFTError: The method does not fit the model; the model is as it was before.
    """
    if not isinstance(model, nn.Module):
        raise PEFTError(f"inject was given a {type(model).__name__} as model. Write inject(model, method).")
    view = resharded(model)
    methods = methods_of(method)
    registry = own_registry(view.module)
    if registry is not None and registry.methods.get(name) == methods:
        return [*registry.hosts[name], *registry.chosen]
    prepared = prepare_injection(view, methods, name, train_also, seed=seed, allow_sharded=allow_sharded)
    if not (torch.distributed.is_initialized() and torch.distributed.get_rank()):
        for remark in view.remarks:
            warnings.warn(remark, stacklevel=2)
    return inject_prepared(view, prepared, name)


def prepare_injection(
    model: ModelView,
    methods: tuple[PEFTMethod, ...],
    name: str,
    train_also: Sequence[str],
    *,
    seed: int | None = None,
    allow_sharded: bool = False,
) -> Prepared:
    """Make and check what :func:`inject_prepared` attaches; ``model`` stays as it is.

    Raises:
        PEFTError: The methods do not fit the model.
    """
    if taken := next((name for name in model.modules if CHILD in name.split(".")), None):
        raise PEFTError(f"{taken!r} has a part called {CHILD!r}, which adapters are called. Give it another name.")
    registry = own_registry(model.module)
    whole = whole_names(model, train_also)
    _check_state(model, registry, name, whole)
    if not allow_sharded:
        _refuse_sharded(model)
    prepared = prepare(model, methods, whole, torch.initial_seed() if seed is None else seed)
    _check_parts(model, prepared, name)
    if registry is not None and prepared.chosen:
        raise PEFTError(
            f"{' + '.join(type(m).__name__ for m in methods)} trains parameters of the model itself "
            f"({prepared.chosen[0]}, …), which cannot be switched with an adapter. Inject it first and alone, or call "
            "eject(model) first."
        )
    return prepared


def inject_prepared(model: ModelView, prepared: Prepared, name: str) -> list[str]:
    """Freeze ``model``, attach what was prepared for it, and return what :func:`inject` returns.

    If it is interrupted, the model is as it was before.
    """
    present = own_registry(model.module)
    active = next((registry.active for _, _, registry in registries(model)), name)
    try:
        registry = present or freeze(model, active, prepared.whole, prepared.chosen)
        registry.methods[name] = prepared.methods
        registry.hosts[name] = prepared.hosts
        for host, adapter in prepared.adapters.items():
            attach(prepared.modules[host], name, adapter, registry.active, model.kind)
        watch(model.module, registry, {**{name: host for name, host, _ in model.slots}, **prepared.modules}.values())
        _forget_compiled()
    except BaseException:
        to_the_end(partial(_take_back, model, prepared, name, present))
        raise
    return [*prepared.hosts, *registry.chosen]


def _take_back(model: ModelView, prepared: Prepared, name: str, present: Registry | None) -> None:
    """Undo an injection that was interrupted, of a further adapter if there was a registry ``present``."""
    for host in prepared.modules.values():
        if CHILD in host._modules:
            detach(host, name)
    if present is None:
        thaw(model)
        return
    present.methods.pop(name, None)
    present.hosts.pop(name, None)
    watch(model.module, present, [host for _, host, _ in model.slots])


def set_adapter(model: nn.Module, name: str) -> None:
    """Make ``name`` the adapter that runs.

    Gradients reach every adapter that ran, also if another one runs by then. A backward pass that recomputes
    activations (gradient checkpointing) has to come before the next switch. An adapter whose parameters were given
    ``requires_grad=False`` stays as it is.

    Raises:
        PEFTError: There is no such adapter, or the model is merged.
    """
    view = resharded(model)
    found = required(view)
    known = sorted({adapter for _, _, registry in found for adapter in registry.methods})
    if name not in known:
        raise PEFTError(f"There is no adapter {name!r}. Adapters: {', '.join(known)}.")
    refuse_merged(view, "switch adapters")
    refuse_stand_in(view, "switch adapters")
    activate(view, [prefix for prefix, _, registry in found if name in registry.methods], name)


def activate(model: ModelView, parts: Sequence[str], name: str) -> None:
    """Have the adapters ``name`` run in ``parts`` of ``model``, which have some that were injected into them."""
    to_the_end(partial(_activate, [model.part(prefix) for prefix in parts], name))


def _activate(parts: Sequence[ModelView], name: str) -> None:
    for part in parts:
        for _, _, registry in registries(part):
            registry.active = name
        for _, _, slot in part.slots:
            slot.activate(name)


def remove(root: ModelView) -> None:
    """Detach the adapters of ``root``, give its parameters their old ``requires_grad``, forget the registry."""
    for _, host, slot in root.slots:
        # Those of a part are gone with it by the time that what is around it is asked.
        if host._modules.get(CHILD) is slot:
            detach(host)
    thaw(root)


def thaw(root: ModelView) -> None:
    """Undo :func:`freeze`, however far it came."""
    if (registry := own_registry(root.module)) is None:
        return
    unwatch(registry)
    for parameter_name, parameter in root.parameters.items():
        parameter.requires_grad_(registry.requires_grad.get(parameter_name, parameter.requires_grad))
        parameter.grad = None
    drop(root.module)


def freeze(model: ModelView, active: str, whole: Sequence[str], chosen: Sequence[str]) -> Registry:
    """Freeze ``model`` but for what is trained, and keep on it what :func:`remove` needs.

    Parts of it that have adapters stay as they are, with those running that are ``active``.
    """
    inside = {id(tensor) for prefix, _, _ in registries(model) for tensor in model.part(prefix).tensors.values()}
    parameters = {name: parameter for name, parameter in model.parameters.items() if id(parameter) not in inside}
    registry = Registry(
        active=active,
        train_also=tuple(whole),
        chosen=tuple(chosen),
        requires_grad={n: p.requires_grad for n, p in parameters.items()},
        frozen=frozen_apart(model).roots,
    )
    registry.whole = {n: host_copy(t) for n, t in changing_tensors(model, chosen, whole).items()}
    buffers = {n: buffer for n, buffer in model.buffers.items() if id(buffer) not in inside}
    registry.buffers = {n: host_copy(buffer) for n, buffer in buffers.items() if n not in registry.whole}
    # What it takes to go back is kept before anything changes.
    keep(model.module, registry)
    for parameter in parameters.values():
        parameter.requires_grad_(False)
        parameter.grad = None
    for parameter_name in {*chosen, *parameter_names(model, whole)}:
        parameters[parameter_name].requires_grad_(True)
    return registry


def _check_state(model: ModelView, registry: Registry | None, name: str, whole: Sequence[str]) -> None:
    if not _NAME.fullmatch(name):
        raise PEFTError(f"The adapter name {name!r} was given; letters, digits, '_' and '-' make a name.")
    # What holds adapters by name has attributes of its own, and what wrappers are called is left out of names.
    if hasattr(Slot(""), name) or not clean_name(name):
        raise PEFTError(f"The adapter name {name!r} was given, which means something else here. Choose another name.")
    if registry is not None and name in registry.methods:
        raise PEFTError(
            f"The model already has an adapter {name!r}: {registry.methods[name]}. Choose another name, or call "
            "eject(model) first."
        )
    if registry is not None and (whole or registry.whole):
        raise PEFTError(_TRAINED_ITSELF)
    refuse_part(model)
    refuse_lazy(model)
    refuse_foreign_adapters(model)
    refuse_merged(model, "inject")
    refuse_stand_in(model, "inject")


def _check_parts(model: ModelView, prepared: Prepared, name: str) -> None:
    """Check that parts of ``model`` that have adapters of their own can get ``name`` beside these."""
    slots = {host: slot for host, _, slot in model.slots}
    if taken := [host for host in prepared.hosts if host in slots and name in slots[host]]:
        raise PEFTError(
            f"{taken[0]!r} already has an adapter {name!r}, which was injected into a part of this model. Choose "
            "another name, leave that part out (exclude_modules), or call eject(model) first."
        )
    itself = {*prepared.chosen, *parameter_names(model, prepared.whole)}
    for prefix, _, registry in registries(model):
        inside = [name for name in (*prepared.hosts, *itself) if is_inside(name, {prefix})]
        if prefix and (itself.intersection(inside) or (inside and registry.whole)):
            raise PEFTError(_TRAINED_ITSELF)


def _refuse_sharded(model: ModelView) -> None:
    wrapped = [name for name, module in model.walked if isinstance(module, FullyShardedDataParallel)]
    for parameter_name, parameter in model.parameters.items():
        if wrapped or isinstance(parameter, DTensor):
            raise PEFTError(
                f"{parameter_name!r} is already sharded: adapters injected now would not be kept equal between "
                "ranks. Inject first, then shard (in configure_model: self.trainer.strategy.inject()); beside layers "
                "that parallelize_module has split, the strategy alone injects, one adapter."
            )


def _forget_compiled() -> None:
    """Drop compiled code: hooks added to a module after it ran compiled would not be seen.

    ``torch.compile(model)`` leaves no trace on ``model``, so this cannot be limited to models that were compiled.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
