"""What was injected into a model, kept on the model itself, so that it survives deepcopy and pickle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.view import ModelView, once
from lightning_peft.errors import PEFTError

_ATTRIBUTE = "_peft_registry"


@dataclass
class Registry:
    """The adapters of one model. Names are relative to the module that it is kept on."""

    methods: dict[str, tuple[PEFTMethod, ...]] = field(default_factory=dict)
    """Methods by adapter name."""
    hosts: dict[str, dict[str, int]] = field(default_factory=dict)
    """By adapter name: the adapted modules by name, each with the position of its method in ``methods``."""
    active: str = ""
    train_also: tuple[str, ...] = ()
    """Names of the modules trained whole."""
    chosen: tuple[str, ...] = ()
    """Names of the base's parameters that methods train."""
    whole: dict[str, Tensor] = field(default_factory=dict)
    """Parameters trained whole, by ``train_also`` or by a method: the values they had before."""
    requires_grad: dict[str, bool] = field(default_factory=dict)
    """``requires_grad`` of the base's parameters before the injection."""
    samples: dict[str, list[float]] | None = None
    """Samples of the base's weights, for when no process has them whole: see ``fingerprint.record_base``."""
    hooks: tuple[RemovableHandle, ...] = ()
    """What ``by_hand.watch`` has registered."""


@once
def registries(model: ModelView) -> list[tuple[str, nn.Module, Registry]]:
    """Return ``(name, module, registry)`` for every module of ``model`` into which adapters were injected."""
    found = ((name, module, own_registry(module)) for name, module in model.walked)
    return [(name, module, registry) for name, module, registry in found if registry is not None]


def required(model: ModelView) -> list[tuple[str, nn.Module, Registry]]:
    """Return what :func:`registries` returns.

    Raises:
        PEFTError: There is nothing, or ``model`` is a part of what adapters were injected into.
    """
    refuse_part(model)
    if not (found := registries(model)):
        raise PEFTError(f"This {model.kind} has no adapters. Call inject(model, method) first.")
    return found


def refuse_part(model: ModelView) -> None:
    """Raise :class:`PEFTError` if ``model`` has adapters that were injected into a module that it is a part of."""
    roots = [f"{name}." if name else "" for name, _, _ in registries(model)]
    for host, _, slot in model.slots:
        if not any(f"{host}.".startswith(root) for root in roots):
            raise PEFTError(
                f"This {model.kind} is a part of the {slot.root} into which its adapters were injected. Give that "
                f"{slot.root} instead of its part."
            )


def trained_whole(model: ModelView) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield name, tensor and old value of everything of the base that is trained itself."""
    for prefix, _, registry in registries(model):
        tensors = model.part(prefix).tensors if registry.whole else {}
        for name, value in registry.whole.items():
            yield f"{prefix}.{name}" if prefix else name, tensors[name], value


def own_registry(model: nn.Module) -> Registry | None:
    """Return the registry kept on ``model`` itself."""
    registry = model.__dict__.get(_ATTRIBUTE)
    return registry if isinstance(registry, Registry) else None


def method_of(registry: Registry, adapter: str, host: str) -> PEFTMethod:
    """Return the method whose adapter named ``adapter`` hangs on ``host``."""
    return registry.methods[adapter][registry.hosts[adapter][host]]


def keep(model: nn.Module, registry: Registry) -> None:
    """Keep ``registry`` on ``model``."""
    object.__setattr__(model, _ATTRIBUTE, registry)


def drop(model: nn.Module) -> None:
    """Forget the registry of ``model``."""
    object.__delattr__(model, _ATTRIBUTE)
