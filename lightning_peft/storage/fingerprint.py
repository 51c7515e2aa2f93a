"""Which base model an adapter belongs to: its name, and a few of its weights."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_peft.core.registry import changed, registries, trained_whole, was_unloaded
from lightning_peft.core.sharding import full_shape, in_zero_pieces, whole
from lightning_peft.core.view import ModelView
from lightning_peft.core.weights import is_packed
from lightning_peft.errors import PEFTError
from lightning_peft.targets.inner_models import transformers_models

_MODULES = 64
_SAMPLES = 4

# Relative distance between two samples. Rounding to bfloat16 gives 0.002 and an unrelated model 1.4; another
# fine-tuning of the same base lies in between.
_TOLERANCE = 0.02


def describe_base(model: ModelView, prefix: str = "") -> dict[str, Any]:
    """Return the base's class, its name or path if it has one, and samples of the weights that adapters adapt.

    Args:
        model: A model with adapters.
        prefix: The part of it to describe; names of samples are relative to it.
    """
    recorded = _recorded(model, prefix)
    samples = _samples(model.part(prefix), _before_training(model)) if recorded is None else recorded
    return {**_identity(model, prefix), "samples": samples}


def record_base(model: ModelView) -> None:
    """Keep samples of the weights with the adapters, for when no process can read them alone any more.

    Every process that holds a piece of the weights has to call it.
    """
    for prefix, _, registry in registries(model):
        if registry.samples is None:
            registry.samples = _samples(model.part(prefix), _before_training(model), gather=True)


def _recorded(model: ModelView, prefix: str = "") -> dict[str, list[float]] | None:
    """Return the samples that were kept, with names relative to ``prefix``."""
    for root, _, registry in registries(model):
        if registry.samples is not None and f"{prefix}.".startswith(f"{root}.".lstrip(".")):
            inside = prefix.removeprefix(root).lstrip(".")
            lead = f"{inside}." if inside else ""
            return {name.removeprefix(lead): v for name, v in registry.samples.items() if name.startswith(lead)}
    return None


def _identity(model: ModelView, prefix: str) -> dict[str, str]:
    part = model.part(prefix)
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
    present = _identity(model, prefix)
    lead = f"{prefix}." if prefix else ""
    theirs = {n: v for n, v in saved.get("samples", {}).items() if f"{lead}{n}.weight".lstrip(".") not in held}
    if saved.get("samples") and not theirs:
        return
    ours = _recorded(model, prefix)
    if ours is None:
        ours = _samples(model.part(prefix), _before_training(model), list(theirs))
    pairs = [pair for name in ours.keys() & theirs.keys() for pair in zip(ours[name], theirs[name], strict=False)]
    norm = math.sqrt(sum(b * b for _, b in pairs))
    distance = math.sqrt(sum((a - b) ** 2 for a, b in pairs))
    # What adapters learnt differs by less than other models do, and would be counted twice.
    unloaded = was_unloaded(model)
    tolerance = 0.0 if unloaded else _TOLERANCE
    # Equal weights under another class name are the same base: a renamed module, or the same encoder with another head.
    if distance > tolerance * norm or (not pairs and saved.get("class") != present["class"]):
        raise PEFTError(
            f"{source} was written for another base model: {_name(saved)}. This is {_name(present)}"
            + (f", whose weights differ by {distance / norm:.0%}." if norm and distance > tolerance * norm else ".")
            + (
                " Adapters were merged into them for good, and the base is gone: build the model anew."
                if unloaded
                else ""
            )
            + " Load the base model that the adapter was trained on."
        )


def _name(base: Mapping[str, Any]) -> str:
    path = base.get("name_or_path")
    return f"{base.get('class')} ({path!r})" if path else str(base.get("class"))


def _samples(
    model: ModelView, before: Mapping[int, Tensor | None], names: Sequence[str] | None = None, gather: bool = False
) -> dict[str, list[float]]:
    """Return a few elements of the weights of the adapted modules, or of ``names``, as they are without adapters.

    ``before`` are the old values of what has changed itself, by id.
    """
    adapted = {name: slot for name, host, slot in model.slots if "weight" in host._parameters}
    modules = model.modules
    # Methods that adapt no weights leave all of them to choose from.
    candidates = list(adapted) or [name for name, module in modules.items() if "weight" in module._parameters]
    chosen = candidates[:: max(1, len(candidates) // _MODULES)] if names is None else names
    found = {}
    for name in chosen:
        slot = adapted.get(name)
        present = getattr(modules.get(name), "weight", None)
        weight = before.get(id(present), slot.merged.get("weight", present) if slot and slot.merged else present)
        if not isinstance(weight, Tensor) or is_packed(modules[name]) or not full_shape(weight).numel():
            continue
        if weight.is_meta or ((isinstance(weight, DTensor) or in_zero_pieces(weight)) and not gather):
            continue
        flat = whole(weight).flatten()
        positions = [flat.numel() * (2 * k + 1) // (2 * _SAMPLES) for k in range(_SAMPLES)]
        found[name] = flat[torch.tensor(positions, device=flat.device)].to("cpu", torch.float32).tolist()
    return found


def _before_training(model: ModelView) -> dict[int, Tensor | None]:
    """Return the old values of what of the base has changed, by the tensor's id; ``None`` if it is not known."""
    return {id(tensor): value for _, tensor, value in (*trained_whole(model), *changed(model))}
