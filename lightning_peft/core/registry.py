"""What was injected into a model, kept on the model itself, so that it survives deepcopy and pickle."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.view import ModelView, once, seen_parameters
from lightning_peft.errors import PEFTError
from lightning_peft.tensors.sharding import assign, host_copy, local_part
from lightning_peft.tensors.weights import is_same

_ATTRIBUTE = "_peft_registry"

_UNLOADED: WeakSet[nn.Module] = WeakSet()
"""Modules that nothing on themselves tells from those that never had adapters."""


@dataclass
class Registry:
    """The adapters of one model. Names are relative to the module that it is kept on.

    If parts of a model have adapters of their own, what is around them has a registry without methods.
    """

    methods: dict[str, tuple[PEFTMethod, ...]] = field(default_factory=dict)
    """Methods by adapter name."""
    hosts: dict[str, dict[str, int]] = field(default_factory=dict)
    """By adapter name: the adapted modules by name, each with the position of its method in ``methods``."""
    active: str = ""
    train_also: tuple[str, ...] = ()
    """Names of the modules trained whole, and of parameters trained by themselves."""
    chosen: tuple[str, ...] = ()
    """Names of the base's parameters that methods train."""
    whole: dict[str, Tensor] = field(default_factory=dict)
    """Parameters trained whole, by ``train_also`` or by a method: the values they had before."""
    buffers: dict[str, Tensor] = field(default_factory=dict)
    """The base's other persistent buffers: the values that they had before, in host memory."""
    moved: set[str] = field(default_factory=set)
    """Names of parameters and buffers of the base that somebody is known to have written to."""
    requires_grad: dict[str, bool] = field(default_factory=dict)
    """``requires_grad`` of the base's parameters before the injection."""
    frozen: tuple[str, ...] = ()
    """Names of the outermost modules that were frozen then beside a network that was trained."""
    samples: dict[str, dict[str, list[float]]] | None = None
    """Samples of the base's weights, for when no process has them whole: see ``fingerprint.record_base``."""
    hooks: tuple[RemovableHandle, ...] = ()
    """What ``by_hand.watch`` has registered."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        # One that an older version pickled has fewer fields.
        vars(self).update({**vars(Registry()), **state})


@once
def registries(model: ModelView) -> list[tuple[str, nn.Module, Registry]]:
    """Return ``(name, module, registry)`` for every module of ``model`` into which adapters were injected."""
    found = ((name, module, own_registry(module)) for name, module in model.walked)
    return [(name, module, registry) for name, module, registry in found if registry is not None]


def adapted(model: ModelView) -> list[tuple[str, nn.Module, Registry]]:
    """Return those of :func:`registries` that have methods."""
    return [found for found in registries(model) if found[2].methods]


def required(model: ModelView) -> list[tuple[str, nn.Module, Registry]]:
    """Return what :func:`registries` returns.

    Raises:
        PEFTError: There is nothing, or ``model`` is a part of what adapters were injected into.
    """
    refuse_part(model)
    if not (found := registries(model)):
        raise PEFTError(f"This {model.kind} has no adapters. Call inject(model, method) first.")
    return found


def trains_everything(model: ModelView) -> bool:
    """Whether a method trains the model as it trains itself."""
    every = (method for _, _, registry in registries(model) for found in registry.methods.values() for method in found)
    return any(method.everything for method in every)


def refuse_part(model: ModelView) -> None:
    """Raise :class:`PEFTError` if ``model`` has adapters that were injected into a module that it is a part of."""
    roots = [f"{name}." if name else "" for name, _, _ in registries(model)]
    for host, _, slot in model.slots:
        if not any(f"{host}.".startswith(root) for root in roots):
            raise PEFTError(
                f"This {model.kind} shares a part with the {slot.root} into which its adapters were injected. Give "
                f"that {slot.root} instead. Or make the part plain first, with merge(module, unload=True), or in a run "
                "with merge_on_train_end='unload'."
            )


def refuse_shared(model: ModelView) -> None:
    """Raise :class:`PEFTError` if a module of ``model`` has an adapter that was injected into what is around it."""
    own = {name for _, _, registry in registries(model) for name in registry.methods}
    for host, _, slot in model.slots:
        if other := next((name for name in slot if name not in own), None):
            raise PEFTError(
                f"{host!r} has an adapter {other!r} as well, which was injected into a module around this "
                f"{model.kind}. Give that module instead."
            )


def trained_whole(model: ModelView) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield name, tensor and old value of everything of the base that is trained itself.

    What has been tied to another since comes first, so that the value of that one's own name is the last for it.
    """
    for prefix, _, registry in registries(model):
        part, lead = model.part(prefix), f"{prefix}." if prefix else ""
        tensors = part.tensors if registry.whole else {}
        for name, value in registry.whole.items():
            if name not in tensors and (tied := part.parameter(name)) is not None:
                yield lead + name, tied, value
        yield from ((lead + name, tensors[name], value) for name, value in registry.whole.items() if name in tensors)


def changed(model: ModelView) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Yield name, tensor and old value of what of the base has changed without being trained.

    That are persistent buffers with another value than before the injection, or that are new since, and what is known
    to have :attr:`~Registry.moved`. The old value of a parameter is not known.
    """
    known = {name for name, _, _ in trained_whole(model)}
    # Parts first, which have buffers of their own to watch.
    for prefix, _, registry in reversed(registries(model)):
        part, lead = model.part(prefix), f"{prefix}." if prefix else ""
        for name, buffer in part.buffers.items():
            before = registry.buffers.get(name)
            new = before is None or name in registry.moved or differs(buffer, before)
            if new and lead + name not in known:
                yield lead + name, buffer, before
            known.add(lead + name)
        moved = {name: part.parameter(name) for name in sorted(registry.moved)}
        yield from ((lead + name, p, None) for name, p in moved.items() if p is not None)


@once
def added(model: ModelView) -> Collection[str]:
    """Return the names of the parameters that ``model`` has got since adapters were injected."""
    known = {f"{p}.{name}" if p else name for p, _, registry in registries(model) for name in registry.requires_grad}
    return seen_parameters(model).keys() - known


def moved(model: ModelView) -> set[str]:
    """Return the names of what is known to have :attr:`~Registry.moved`."""
    return {f"{prefix}.{name}".lstrip(".") for prefix, _, registry in registries(model) for name in registry.moved}


def note_moved(model: ModelView, names: Iterable[str]) -> None:
    """Note that ``names`` have :attr:`~Registry.moved`, each with the innermost adapted module around it."""
    for name in names:
        prefix, registry = max(
            ((p, r) for p, _, r in registries(model) if f"{name}.".startswith(f"{p}." if p else "")),
            key=lambda found: len(found[0]),
        )
        registry.moved.add(name.removeprefix(f"{prefix}.") if prefix else name)


def remember_buffers(model: ModelView, *, again: bool = False) -> None:
    """Keep the values of buffers that had no memory when adapters were injected; of all, if they are made ``again``."""
    for prefix, _, registry in registries(model):
        for name, buffer in model.part(prefix).buffers.items():
            if name in registry.buffers and (again or registry.buffers[name].is_meta):
                registry.buffers[name] = host_copy(buffer)


def restore_changed(model: ModelView, but_for: Collection[str] = ()) -> list[str]:
    """Give what has changed its old value, and return the names of that of which it is not known.

    Args:
        model: A model with adapters.
        but_for: Names of what is left as it is.
    """
    unknown = []
    for name, tensor, before in list(changed(model)):
        if name in but_for:
            continue
        if before is None:
            unknown.append(name)
        else:
            assign(tensor, before)
    return unknown


def differs(tensor: Tensor, before: Tensor) -> bool:
    """Whether ``tensor`` has another value than ``before``, but for a dtype that it was cast to since."""
    tensor, before = local_part(tensor), local_part(before)
    if tensor.shape != before.shape or before.is_meta or tensor.is_meta:
        return tensor.shape != before.shape
    return not is_same(tensor, before.to(tensor))


def several_adapters(model: ModelView) -> list[str]:
    """Return the names of the adapters of which one or another may run; none, if there is no choice."""
    return sorted(
        {name for _, _, registry in registries(model) if len(registry.methods) > 1 for name in registry.methods}
    )


def own_registry(model: nn.Module) -> Registry | None:
    """Return the registry kept on ``model`` itself."""
    registry = model.__dict__.get(_ATTRIBUTE)
    return registry if isinstance(registry, Registry) else None


def note_unloaded(model: nn.Module) -> None:
    """Note that adapters were merged into the weights of ``model`` for good."""
    _UNLOADED.add(model)


def was_unloaded(model: ModelView) -> bool:
    """Whether that holds for ``model`` or a part of it, as far as this process knows."""
    return any(module in _UNLOADED for module in model.modules.values())


def method_of(registry: Registry, adapter: str, host: str) -> PEFTMethod:
    """Return the method whose adapter named ``adapter`` hangs on ``host``."""
    return registry.methods[adapter][registry.hosts[adapter][host]]


def keep(model: nn.Module, registry: Registry) -> None:
    """Keep ``registry`` on ``model``."""
    object.__setattr__(model, _ATTRIBUTE, registry)


def drop(model: nn.Module) -> None:
    """Forget the registry of ``model``."""
    model.__dict__.pop(_ATTRIBUTE, None)
