"""Put adapters into a model and switch between them. Everything is checked before anything changes."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_peft.adapter import Adapter, Slot, attach, clean_name, detach, slots, unwrap
from lightning_peft.errors import PEFTError
from lightning_peft.method import PEFTMethod
from lightning_peft.registry import Registry, drop, keep, own_registry, registries, required
from lightning_peft.select import match_names, named_modules, require_matches

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


def inject(
    model: nn.Module,
    method: PEFTMethod,
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
        method: What to inject, for example ``LoRA(r=8)``.
        name: Name of this adapter.
        train_also: Patterns of modules to train whole and to save with the adapter, such as a classification head.
        seed: Seed of the initial values; ``torch.initial_seed()`` if not given.
        allow_sharded: Accept a model whose parameters are sharded (DTensor). The caller then has to keep the adapters
            equal between processes, as ``PEFTStrategy`` does.

    Returns:
        The names of the adapted modules.

    Raises:
        PEFTError: The method does not fit the model; the model is as it was before.
    """
    model = unwrap(model)
    registry = own_registry(model)
    if registry is not None and registry.methods.get(name) == method:
        return list(registry.hosts[name])
    whole = _whole_modules(model, train_also)
    _check_state(model, registry, name, whole)
    if not allow_sharded:
        _refuse_sharded(model)
    inside = {id(part) for module in whole.values() for part in module.modules()}
    hosts = {host: module for host, module in method.select(model).items() if id(module) not in inside}
    if not hosts:
        raise PEFTError(f"{method}: every module it selects is trained whole by train_also={list(train_also)!r}.")
    seed = torch.initial_seed() if seed is None else seed
    adapters: dict[str, Adapter] = {host: method.adapter(host, module, seed) for host, module in hosts.items()}

    if registry is None:
        registry = _freeze(model, name, whole)
    registry.methods[name] = method
    registry.hosts[name] = tuple(hosts)
    for host, module in hosts.items():
        attach(module, name, adapters[host])
    set_adapter(model, registry.active)
    _forget_compiled()
    return list(hosts)


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


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of ``model`` that are no adapter's, by clean name."""
    adapters = {id(p) for _, _, slot in slots(model) for p in slot.parameters()}
    return {clean_name(name): p for name, p in model.named_parameters() if id(p) not in adapters}


def _freeze(model: nn.Module, name: str, whole: dict[str, nn.Module]) -> Registry:
    """Freeze ``model`` but for the modules trained whole, and keep on it what :func:`remove` needs."""
    parameters = base_parameters(model)
    registry = Registry(
        active=name, train_also=tuple(whole), requires_grad={n: p.requires_grad for n, p in parameters.items()}
    )
    for parameter in parameters.values():
        parameter.requires_grad_(False)
        parameter.grad = None
    for module_name, module in whole.items():
        for parameter_name, parameter in module.named_parameters(prefix=module_name):
            registry.whole[clean_name(parameter_name)] = parameter.detach().clone()
            parameter.requires_grad_(True)
    keep(model, registry)
    return registry


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
    if registry is not None and (whole or registry.train_also):
        raise PEFTError(
            "A module trained whole belongs to one adapter: train_also cannot be combined with several adapters in "
            "one model. Call eject(model) first, or inject without train_also."
        )
    others = [other for other, _, found in registries(model) if found is not registry]
    if others:
        raise PEFTError(
            f"Adapters were already injected into {others[0]!r}, a part of this model. Inject into that part again, "
            "or call eject(model) first."
        )
    refuse_merged(model, "inject")


def _refuse_sharded(model: nn.Module) -> None:
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
