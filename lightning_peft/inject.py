"""Put adapters into a model and switch between them. Everything is checked before anything changes."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_peft.adapter import (
    CHILD,
    Adapter,
    Slot,
    attach,
    base_parameters,
    base_tensors,
    clean_name,
    detach,
    slots,
    unwrap,
)
from lightning_peft.errors import PEFTError
from lightning_peft.method import PEFTMethod, methods_of
from lightning_peft.registry import Registry, drop, keep, own_registry, registries, required
from lightning_peft.select import match_names, named_modules, require_matches

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


def inject(
    model: nn.Module,
    method: PEFTMethod | Sequence[PEFTMethod],
    *,
    name: str = "default",
    train_also: Sequence[str] = (),
    seed: int | None = None,
) -> list[str]:
    """Freeze ``model`` and attach the adapters of ``method`` to it; the first adapter injected becomes active.

    Base parameters keep their names, the host modules their class and identity, and the outputs are bit for bit
    those of the base model for every method that starts as the identity. Injecting the same method under the same
    name again does nothing.

    Args:
        model: Any module. One that was compiled is compiled anew at its next call.
        method: What to inject, for example ``LoRA(r=8)``; several methods make one adapter together.
        name: Name of this adapter.
        train_also: Patterns of modules to train whole and to save with the adapter, such as a classification head.
        seed: Seed of the initial values; ``torch.initial_seed()`` if not given.

    Returns:
        The names of the adapted modules, then those of the base's parameters that the method trains.

    Raises:
        PEFTError: The method does not fit the model; the model is as it was before.
    """
    model = unwrap(model)
    methods = methods_of(method)
    registry = own_registry(model)
    if registry is not None and registry.methods.get(name) == methods:
        return [*registry.hosts[name], *registry.chosen]
    whole = _whole_modules(model, train_also)
    _check_state(model, registry, name, whole)
    plan = _plan(model, methods, whole, torch.initial_seed() if seed is None else seed)
    if registry is not None and plan.chosen:
        raise PEFTError(
            f"{' + '.join(type(m).__name__ for m in methods)} trains parameters of the model itself ({plan.chosen[0]}, "
            "…), which cannot be switched with an adapter. Inject it first and alone, or call eject(model) first."
        )

    if registry is None:
        registry = _freeze(model, name, whole, plan.chosen)
    registry.methods[name] = methods
    registry.hosts[name] = plan.hosts
    for host, adapter in plan.adapters.items():
        attach(plan.modules[host], name, adapter)
    set_adapter(model, registry.active)
    _forget_compiled()
    return [*plan.hosts, *registry.chosen]


def planned_shapes(
    model: nn.Module, methods: Sequence[PEFTMethod], name: str, train_also: Sequence[str]
) -> tuple[dict[str, torch.Size], set[str]]:
    """Return the shapes of the tensors that an adapter would have in ``model``, by name, and which are buffers.

    Raises:
        PEFTError: As :func:`inject`.
    """
    whole = _whole_modules(model, train_also)
    plan = _plan(model, methods, whole, seed=0)
    shapes: dict[str, torch.Size] = {}
    buffers: set[str] = set()
    seen: set[int] = set()
    for host, adapter in plan.adapters.items():
        for key, tensor in adapter.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                full = ".".join(part for part in (host, CHILD, name, key) if part)
                shapes[full] = tensor.shape
                buffers |= set() if isinstance(tensor, nn.Parameter) else {full}
    trained = {*plan.chosen, *_parameter_names(whole)}
    return {**shapes, **{key: tensor.shape for key, tensor in _kept(model, trained).items()}}, buffers


def set_adapter(model: nn.Module, name: str) -> None:
    """Make ``name`` the adapter that runs and trains.

    Raises:
        PEFTError: There is no such adapter, or the model is merged.
    """
    found = required(model)
    known = sorted({adapter for _, _, registry in found for adapter in registry.methods})
    if name not in known:
        raise PEFTError(f"There is no adapter {name!r}. Adapters: {', '.join(known)}.")
    refuse_merged(model, "switch adapters")
    for _, root, registry in found:
        if name not in registry.methods:
            continue
        registry.active = name
        for _, _, slot in slots(root):
            slot.active = name
            for adapter_name, adapter in slot.items():
                adapter.requires_grad_(adapter_name == name)


def remove(root: nn.Module, registry: Registry) -> None:
    """Detach the adapters of ``root``, give its parameters their old ``requires_grad``, forget the registry."""
    for _, host, _ in list(slots(root)):
        detach(host)
    for parameter_name, parameter in base_parameters(root).items():
        parameter.requires_grad_(registry.requires_grad.get(parameter_name, parameter.requires_grad))
        parameter.grad = None
    drop(root)


def refuse_merged(model: nn.Module, action: str) -> None:
    """Raise :class:`PEFTError` if adapters are merged into the weights of ``model``."""
    if any(slot.merged is not None for _, _, slot in slots(model)):
        raise PEFTError(f"Cannot {action}: the adapters are merged into the weights. Call unmerge(model) first.")


@dataclass(frozen=True)
class _Plan:
    """What methods want of a model."""

    modules: dict[str, nn.Module]
    """The modules to adapt."""
    adapters: dict[str, Adapter]
    hosts: dict[str, int]
    """Position of the method, by module."""
    chosen: tuple[str, ...]
    """The parameters to train that no module trained whole holds."""


def _plan(model: nn.Module, methods: Sequence[PEFTMethod], whole: dict[str, nn.Module], seed: int) -> _Plan:
    """Make the adapters, in the model's order, without attaching them."""
    inside = {id(part) for module in whole.values() for part in module.modules()}
    modules: dict[str, nn.Module] = {}
    adapters: dict[str, Adapter] = {}
    owners: dict[str, int] = {}
    chosen: set[str] = set()
    for position, method in enumerate(methods):
        selected = method.select(model)
        hosts = {host: module for host, module in selected.items() if id(module) not in inside}
        trained = list(method.trained(model))
        if not hosts and not trained:
            reason = "train_also trains every module that it selects whole" if selected else "it selects nothing"
            raise PEFTError(f"{method} has nothing to do in this {type(model).__name__}: {reason}.")
        if twice := [host for host in hosts if host in owners]:
            other = methods[owners[twice[0]]]
            raise PEFTError(
                f"{type(other).__name__} and {type(method).__name__} would both adapt {twice[0]!r}; a module takes one "
                "adapter. Give one of them other target_modules, or exclude_modules."
            )
        modules.update(hosts)
        owners.update(dict.fromkeys(hosts, position))
        adapters.update(method.adapters(model, hosts, seed) if hosts else {})
        chosen.update(trained)
    order = [host for host in named_modules(model) if host in owners]
    names = [n for n in base_parameters(model) if n in chosen - _parameter_names(whole)]
    return _Plan(modules, {h: adapters[h] for h in order}, {h: owners[h] for h in order}, tuple(names))


def _parameter_names(modules: dict[str, nn.Module]) -> set[str]:
    return {clean_name(name) for prefix, module in modules.items() for name, _ in module.named_parameters(prefix)}


def _freeze(model: nn.Module, name: str, whole: dict[str, nn.Module], chosen: Sequence[str]) -> Registry:
    """Freeze ``model`` but for what is trained whole, and keep on it what :func:`remove` needs."""
    parameters = base_parameters(model)
    registry = Registry(
        active=name,
        train_also=tuple(whole),
        chosen=tuple(chosen),
        requires_grad={n: p.requires_grad for n, p in parameters.items()},
    )
    for parameter in parameters.values():
        parameter.requires_grad_(False)
        parameter.grad = None
    trained = {*chosen, *_parameter_names(whole)}
    for parameter_name in trained:
        parameters[parameter_name].requires_grad_(True)
    for tensor_name, tensor in _kept(model, trained).items():
        # In host memory: with full fine-tuning this is a copy of the whole model.
        registry.whole[tensor_name] = tensor.detach().to("meta" if tensor.is_meta else "cpu", copy=True)
    keep(model, registry)
    return registry


def _kept(model: nn.Module, trained: set[str]) -> dict[str, Tensor]:
    """Return the tensors that change when the parameters ``trained`` are: they, and running statistics beside them."""
    base = base_tensors(model)
    norms = {
        name
        for name, module in named_modules(model).items()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        if any(f"{name}.{parameter}".lstrip(".") in trained for parameter in module._parameters)
    }
    return {name: t for name, t in base.items() if name in trained or name.rpartition(".")[0] in norms}


def _whole_modules(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    modules = named_modules(model)
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    require_matches(patterns, modules, "train_also")
    names = set().union(*(match_names(pattern, modules) for pattern in patterns))
    outermost = {n: modules[n] for n in modules if n in names and not any(n.startswith(f"{o}.") for o in names)}
    owners: dict[int, set[str]] = {}
    for module_name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(module_name)
    for module_name, module in outermost.items():
        if not any(True for _ in module.parameters()):
            raise PEFTError(f"train_also: {module_name!r} ({type(module).__name__}) has no parameters to train.")
        for parameter in module.parameters():
            outside = [o for o in owners[id(parameter)] if o != module_name and not o.startswith(f"{module_name}.")]
            if outside:
                raise PEFTError(
                    f"train_also: {module_name!r} shares a parameter with {outside[0]!r}, which would be trained with "
                    "it. Untie them first, or adapt the module by naming it in target_modules."
                )
    return outermost


def _check_state(model: nn.Module, registry: Registry | None, name: str, whole: dict[str, nn.Module]) -> None:
    if not _NAME.fullmatch(name) or hasattr(nn.ModuleDict, name) or hasattr(Slot, name):
        raise PEFTError(f"The adapter name {name!r} was given; letters, digits, '_' and '-' make a name.")
    if registry is not None and name in registry.methods:
        raise PEFTError(
            f"The model already has an adapter {name!r}: {registry.methods[name]}. Choose another name, or call "
            "eject(model) first."
        )
    if registry is not None and (whole or registry.whole):
        raise PEFTError(
            "A module or parameter of the model that is trained itself belongs to one adapter: train_also and methods "
            "that train parameters of the model cannot be combined with several adapters in one model. Call "
            "eject(model) first, or inject without it."
        )
    others = [other for other, _, found in registries(model) if found is not registry]
    if others:
        raise PEFTError(
            f"Adapters were already injected into {others[0]!r}, a part of this model. Inject into that part again, "
            "or call eject(model) first."
        )
    refuse_merged(model, "inject")
    for parameter_name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) or "_fsdp_wrapped_module" in parameter_name:
            raise PEFTError(
                f"{parameter_name!r} is already sharded: adapters injected now would not be kept equal between "
                "ranks. Inject first, then shard (in configure_model: self.trainer.strategy.inject())."
            )


def _forget_compiled() -> None:
    """Drop compiled code: hooks added to a module after it ran compiled would not be seen.

    ``torch.compile(model)`` leaves no trace on ``model``, so this cannot be limited to models that were compiled.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
