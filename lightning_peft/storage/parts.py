"""Which part of a model goes into which directory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.registry import Registry, registries
from lightning_peft.core.view import ModelView
from lightning_peft.formats.addition import form_of
from lightning_peft.formats.content import Part
from lightning_peft.structure.inner_models import InnerModels
from lightning_peft.tensors.weights import is_conv1d


def parts_of(model: ModelView, names: Iterable[str] | None) -> tuple[list[Part], list[str]]:
    """Return the content of each directory, and the parameters trained whole that have a place in none."""
    parts: dict[tuple[str, str], Part] = {}
    inner = InnerModels(model, _adapted(model))
    for registry_prefix, _, registry in registries(model):
        for adapter in registry.methods if names is None else [n for n in names if n in registry.methods]:
            listed = _full_names(registry_prefix, registry, adapter)
            methods = registry.methods[adapter]
            position_of = {f"{registry_prefix}.{h}".strip("."): i for h, i in registry.hosts[adapter].items()}
            own = _is_own(model, methods, position_of, inner, listed) or _has_bare(model, inner, listed)
            # HF PEFT reads one transformers model at a time; the own format has room for what is around it.
            common = _common_prefix(inner.transformers, registry_prefix, listed) if own else None
            for what, name in [(what, name) for what, full_names in listed.items() for name in full_names]:
                prefix = inner.around(name) if common is None else common
                part = parts.setdefault((prefix, adapter), Part(prefix, adapter, methods, own_format=own))
                if what == "hosts":
                    part.hosts[_relative(name, prefix)] = position_of[name]
                else:
                    getattr(part, what).append(_relative(name, prefix))
    kept = [part for part in parts.values() if part.hosts or part.chosen]
    beside = [part for part in parts.values() if not (part.hosts or part.chosen)]
    rest = [
        f"{p}.{name}".lstrip(".")
        for p, _, registry in registries(model)
        for name in registry.whole
        if not registry.methods
    ]
    return kept, [*(f"{part.prefix}.{name}".strip(".") for part in beside for name in part.whole), *rest]


def _is_own(
    model: ModelView,
    methods: tuple[PEFTMethod, ...],
    position_of: Mapping[str, int],
    inner: InnerModels,
    listed: Mapping[str, list[str]],
) -> bool:
    """Whether HF PEFT's format has no room for ``methods``.

    It has for some modules, and for several methods if they stand beside one of them, in one model with it.
    """
    form = form_of(methods)
    if form is None:
        return True
    main = [host for host, position in position_of.items() if position == form.main]
    if not form.counterpart.on_conv1d and any(is_conv1d(model.modules[host]) for host in main if host in model.modules):
        return True
    if not form.added:
        return False
    around = {inner.around(host) for host in main}
    return any(inner.around(name) not in around for name in (*position_of, *listed["chosen"]))


def _has_bare(model: ModelView, inner: InnerModels, listed: Mapping[str, list[str]]) -> bool:
    """Whether a parameter is trained by itself in an adapted model: HF PEFT would leave it as it is, without a word."""
    adapted = {inner.around(host) for host in listed["hosts"]}
    return any(name not in model.modules and inner.around(name) in adapted for name in listed["train_also"])


def _full_names(prefix: str, registry: Registry, adapter: str) -> dict[str, list[str]]:
    """Return what a part lists, by attribute, with names in the whole model."""
    listed = {
        "hosts": list(registry.hosts[adapter]),
        "chosen": list(registry.chosen),
        "train_also": list(registry.train_also),
        "whole": [name for name in registry.whole if name not in registry.chosen],
    }
    return {what: [f"{prefix}.{name}".strip(".") for name in names] for what, names in listed.items()}


def _common_prefix(inner: Iterable[str], registry_prefix: str, names: Mapping[str, list[str]]) -> str:
    """Return the transformers model that all ``names`` are in, or else what the adapters were injected into."""
    flat = [name for listed in names.values() for name in listed]
    around = [p for p in inner if all(n == p or n.startswith(f"{p}.") for n in flat)]
    return around[0] if around and len(around[0]) > len(registry_prefix) else registry_prefix


def _adapted(model: ModelView) -> list[str]:
    """Return the names of all modules that are adapted, or of which a method trains parameters."""
    return [
        f"{prefix}.{name}".lstrip(".")
        for prefix, _, registry in registries(model)
        for name in (
            *(h for hosts in registry.hosts.values() for h in hosts),
            *(_module_of(c) for c in registry.chosen),
        )
    ]


def _module_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _relative(name: str, prefix: str) -> str:
    if name == prefix:
        return ""
    return name.removeprefix(f"{prefix}.") if prefix else name
