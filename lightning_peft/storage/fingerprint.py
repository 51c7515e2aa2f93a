"""Which base model an adapter belongs to: its name, and a few of its weights."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_peft.core.registry import changed, registries, trained_whole, was_unloaded
from lightning_peft.core.view import ModelView, seen_parameters
from lightning_peft.errors import PEFTError
from lightning_peft.structure.inner_models import transformers_models
from lightning_peft.structure.layers import listed_blocks
from lightning_peft.tensors.packed import holds_codes, is_rounded
from lightning_peft.tensors.sharding import full_shape, in_flat_pieces, in_zero_pieces, whole
from lightning_peft.tensors.weights import own_parameter

Samples = dict[str, list[float]]
"""A few elements of the weights of modules, by the modules' names, or of other parameters by their own."""

_KINDS = ("samples", "frozen", "others")
"""What is adapted, the matrices that are not, and every other parameter; older files have fewer of them."""

_MODULES = 64
_MANY = 2**20
_SAMPLES = 4

# Relative distance between two samples. Rounding to bfloat16 gives 0.002 and an unrelated model 1.4; another
# fine-tuning of the same base lies in between.
_TOLERANCE = 0.02

_DRAWN = (
    "If such weights are drawn at random where the module is made, draw them from the same seed, or save them with "
    "PEFTStrategy(..., checkpoint='full')"
)


def describe_base(model: ModelView, prefix: str = "") -> dict[str, Any]:
    """Return the base's class, its name or path if it has one, and samples of weights.

    Those are of what is adapted, of the other matrices that are frozen (a head, for one, may be new and random), and of
    the other parameters: biases, norms, what modules of recurrent networks hold, positions.

    Args:
        model: A model with adapters.
        prefix: The part of it to describe; names of samples are relative to it.
    """
    recorded = _recorded(model, prefix)
    samples = _described(model.part(prefix), _before_training(model)) if recorded is None else recorded
    return {**identity(model.part(prefix)), **samples}


def record_base(model: ModelView) -> None:
    """Keep samples of the weights with the adapters, for when no process can read them alone any more.

    Every process that holds a piece of the weights has to call it.
    """
    for prefix, _, registry in registries(model):
        if registry.samples is None:
            registry.samples = _described(model.part(prefix), _before_training(model), gather=True)


def _described(model: ModelView, before: Mapping[int, Tensor | None], gather: bool = False) -> dict[str, Samples]:
    """Return what the description of a base has of its weights."""
    weights = {n: w for n, module in model.modules.items() if (w := own_parameter(module, "weight")) is not None}
    adapted = [name for name, _, _ in model.slots if name in weights]
    hosts = frozenset(adapted)
    frozen = [n for n, w in weights.items() if n not in hosts and len(full_shape(w)) > 1 and id(w) not in before]
    seen = {id(weights[name]) for name in (*adapted, *frozen)}
    others = [n for n, p in seen_parameters(model).items() if id(p) not in seen and id(p) not in before]
    # Methods that adapt no weights leave all of them to choose from.
    chosen = {"samples": _thinned(adapted or list(weights))}
    # Heads stand beside the lists of layers, or are the last of them.
    blocks = listed_blocks(model)
    for kind, names in (("frozen", frozen), ("others", others)):
        inside = [name for name in names if _tensor(kind, name).rpartition(".")[0] in blocks]
        kept = {*names} - {*inside} | {*_thinned(inside)}
        chosen[kind] = [name for name in names if name in kept]
    return {kind: _samples(model, kind, names, before, gather) for kind, names in chosen.items()}


def _recorded(model: ModelView, prefix: str = "") -> dict[str, Samples] | None:
    """Return the samples that were kept, with names relative to ``prefix``."""
    for root, _, registry in registries(model):
        if registry.samples is not None and f"{prefix}.".startswith(f"{root}.".lstrip(".")):
            inside = prefix.removeprefix(root).lstrip(".")
            lead = f"{inside}." if inside else ""
            return {
                kind: {name.removeprefix(lead): v for name, v in samples.items() if name.startswith(lead)}
                for kind, samples in registry.samples.items()
            }
    return None


def identity(part: ModelView) -> dict[str, str]:
    """Return the class of the base, and its name or path."""
    named = next(iter(transformers_models(part).values()), part.module)
    path = getattr(getattr(named, "config", None), "_name_or_path", "")
    return {"class": _class_name(named), "name_or_path": str(path or "")}


def _class_name(module: nn.Module) -> str:
    """Return the name of the class that the module had before FSDP2 made a class of its own for it."""
    return next(kind.__name__ for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


def refuse_other_base(
    model: ModelView, saved: Mapping[str, Any], source: str, prefix: str = "", held: Container[str] = ()
) -> None:
    """Check that ``saved``, from :func:`describe_base`, is about the base of ``model``, its part ``prefix``.

    Args:
        model: A model with adapters.
        saved: The description.
        source: What to call it in errors.
        prefix: The part of ``model`` that it is about.
        held: Names of tensors that are loaded as well: what ``model`` has in their place does not count.

    Raises:
        PEFTError: It is about another one; both are named.
    """
    part = model.part(prefix)
    present = identity(part)
    theirs = {kind: _without(kind, saved.get(kind, {}), prefix, held) for kind in _KINDS}
    if saved.get("samples") and not theirs["samples"]:
        return
    ours = _recorded(model, prefix)
    if ours is None:
        before = _before_training(model)
        ours = {kind: _samples(part, kind, list(theirs[kind]), before) for kind in _KINDS}
    found = _distances(ours["samples"], theirs["samples"])
    distance, norm = (math.hypot(*(pair[i] for pair in found.values())) for i in (0, 1))
    # What adapters learnt differs by less than other models do, and would be counted twice.
    unloaded = was_unloaded(model)
    tolerance = 0.0 if unloaded else _TOLERANCE
    # Equal weights under another class name are the same base: a renamed module, or the same encoder with another head.
    if distance > tolerance * norm or (not found and (unloaded or saved.get("class") != present["class"])):
        raise PEFTError(
            f"{source} was written for another base model: {_name(saved)}. This is {_name(present)}"
            + (f", whose weights differ by {distance / norm:.0%}." if norm and distance > tolerance * norm else ".")
            + (" Adapters were merged into them for good, so the base is gone: build it anew." if unloaded else "")
            + f" Load the base model that the adapter was trained on. {_DRAWN}."
        )
    for kind in ("frozen", "others"):
        if other := _other_parts(_distances(ours.get(kind, {}), theirs[kind])):
            raise PEFTError(
                f"{source} was written beside another {other[0]!r}. It was frozen, so it is not in there, and here it "
                f"has other values. Give it the same ones. {_DRAWN}, or train them with train_also=[{other[0]!r}]."
            )


def _without(kind: str, samples: Samples, prefix: str, held: Container[str]) -> Samples:
    """Return ``samples`` without those of tensors that are ``held``."""
    return {n: sample for n, sample in samples.items() if f"{prefix}.{_tensor(kind, n)}".lstrip(".") not in held}


def _tensor(kind: str, name: str) -> str:
    """Return the parameter's name of what has ``name`` among samples of ``kind``."""
    return name if kind == "others" else f"{name}.weight".lstrip(".")


def _distances(ours: Samples, theirs: Samples) -> dict[str, tuple[float, float]]:
    """Return the distance of our sample from theirs, and the norm of theirs, where there are both."""
    return {
        name: (math.dist(ours[name], theirs[name]), math.hypot(*theirs[name]))
        for name in theirs
        if name in ours and len(ours[name]) == len(theirs[name])
    }


def _other_parts(found: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return the names of samples that are further apart than by rounding; of one near zero, rounding is more."""
    typical = math.hypot(*(norm for _, norm in found.values())) / math.sqrt(len(found) or 1)
    return [name for name, (d, norm) in found.items() if d > _TOLERANCE * max(norm, typical / 10)]


def _name(base: Mapping[str, Any]) -> str:
    path = base.get("name_or_path")
    return f"{base.get('class')} ({path!r})" if path else str(base.get("class"))


def _samples(
    model: ModelView, kind: str, names: Iterable[str], before: Mapping[int, Tensor | None], gather: bool = False
) -> Samples:
    """Return a few elements of the parameter of each of ``names``, as it is without adapters.

    Of what is adapted they are from all over, else the first ones, which stay where they are if rows are added.

    Args:
        model: The model.
        kind: One of ``_KINDS``.
        names: Names of that kind.
        before: The old values of what has changed itself, by id.
        gather: Whether every process is here, to read weights that are in pieces.
    """
    at_start = kind != "samples"
    # A layer that is adapted is gathered sooner or later, an embedding need never be.
    most = _MANY if at_start else math.inf
    before = {**_before_merge(model), **before}
    found = {}
    for name in names:
        owner, _, leaf = _tensor(kind, name).rpartition(".")
        module = model.modules.get(owner)
        present = getattr(module, leaf, None)
        tensor = before.get(id(present), present)
        if not isinstance(tensor, Tensor) or holds_codes(tensor) or not full_shape(tensor).numel():
            continue
        if module is not None and is_rounded(module):
            continue
        if in_flat_pieces(tensor) and not in_zero_pieces(tensor):
            continue  # FSDP1's, which their unit alone can gather
        in_pieces = isinstance(tensor, DTensor) or in_zero_pieces(tensor)
        if tensor.is_meta or (in_pieces and not (gather and full_shape(tensor).numel() <= most)):
            continue
        flat = whole(tensor).flatten()
        count = flat.numel()
        positions = [min(k, count - 1) if at_start else count * (2 * k + 1) // (2 * _SAMPLES) for k in range(_SAMPLES)]
        found[name] = flat[torch.tensor(positions, device=flat.device)].to("cpu", torch.float32).tolist()
    return found


def _thinned(names: Sequence[str]) -> list[str]:
    """Return some of ``names``, evenly, with the last."""
    return list(names[::-1][:: max(1, len(names) // _MODULES)])[::-1]


def _before_training(model: ModelView) -> dict[int, Tensor | None]:
    """Return the old values of what of the base has changed, by the tensor's id; ``None`` if it is not known."""
    return {id(tensor): value for _, tensor, value in (*trained_whole(model), *changed(model))}


def _before_merge(model: ModelView) -> dict[int, Tensor | None]:
    """Return what merging has replaced, by the tensor's id; ``None`` for what it has added."""
    return {
        id(parameter): None if slot.merged.get(f"added_{name}") else slot.merged[name]
        for _, host, slot in model.slots
        if slot.merged is not None
        for name, parameter in host.named_parameters()
        if name in slot.merged or f"added_{name}" in slot.merged
    }
