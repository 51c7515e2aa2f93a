"""What the user had frozen before adapters came: a reward, a teacher, a perceptual loss; or the backbone to adapt.

A network that is frozen beside one that is trained is to stay as it is: what finds modules by itself passes over it.
But many freeze a backbone by hand before they adapt it, and have at most a head beside it that is not. The sizes tell
the two apart: what is not frozen is a network beside the others if it has at least a tenth of their weights.

A frozen copy of what is trained, such as a teacher that follows its student, is adapted like that, with adapters that
start equal and stay frozen: code that goes over the parameters of both finds the same ones in both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from lightning_peft.core.registry import registries
from lightning_peft.core.view import ModelView, is_inside, once
from lightning_peft.tensors.packed import is_packed
from lightning_peft.tensors.sharding import full_shape, whole

REASON = "frozen before, beside what is trained; name it to adapt it all the same"

_NETWORK = 0.1


@dataclass
class Frozen:
    """What a user had frozen beside a network that is trained."""

    roots: tuple[str, ...] = ()
    """The outermost modules of which everything is frozen."""
    left: set[str] = field(default_factory=set)
    """They and what is in them, but for copies."""
    copies: dict[str, str] = field(default_factory=dict)
    """Those that are copies of what is trained, and what is in them, each with what it is a copy of."""


@once
def frozen_apart(model: ModelView) -> Frozen:
    """Return what was frozen beside a network that is trained; nothing, if there is at most a head to train."""
    frozen, rest = _frozen_and_rest(model)
    if _is_head(rest, frozen):
        return Frozen()
    free = {module for name in rest for module in _around(name)}
    still = {module for name in frozen for module in _around(name)} - free
    roots = tuple(n for n in model.modules if n in still and n.rpartition(".")[0] not in still)
    originals = {root: original for root in roots if (original := _original(model, root, free)) is not None}
    copies = {n: to + n[len(root) :] for root, to in originals.items() for n in model.modules if is_inside(n, [root])}
    left = {name for name in model.modules if is_inside(name, roots)} - copies.keys()
    return Frozen(roots, left, copies)


def head_beside(model: ModelView) -> set[str]:
    """Return the parameters that a user had left to be trained beside a backbone frozen by hand, but for networks."""
    frozen, rest = _frozen_and_rest(model)
    return set(rest) if _is_head(rest, frozen) else set()


def left_frozen(model: ModelView, names: Collection[str]) -> set[str]:
    """Return those of ``names``, of modules, that are to stay as they are; none, if nothing else would remain."""
    found = frozen_apart(model).left.intersection(names)
    return found if len(found) < len(names) else set()


def _is_head(rest: Mapping[str, int], frozen: Mapping[str, int]) -> bool:
    return sum(rest.values()) < _NETWORK * sum(frozen.values())


def _frozen_and_rest(model: ModelView) -> tuple[dict[str, int], dict[str, int]]:
    """Return the sizes of what a user had frozen, and of the rest, by the parameters' names."""
    frozen, rest = dict[str, int](), dict[str, int]()
    for name, size, trained in _weights(model):
        (rest if trained else frozen)[name] = size
    return frozen, rest


def _weights(model: ModelView) -> Iterator[tuple[str, int, bool]]:
    """Yield name and size of every parameter that could be trained, and whether it was before there were adapters."""
    before = {
        f"{prefix}.{name}".lstrip("."): required
        for prefix, _, registry in registries(model)
        for name, required in registry.requires_grad.items()
    }
    also = [f"{p}.{name}".lstrip(".") for p, _, registry in registries(model) for name in registry.train_also]
    for name, parameter in model.parameters.items():
        owner = name.rpartition(".")[0]
        packed = is_packed(model.modules[owner]) or not parameter.is_floating_point()
        if not packed and not is_inside(owner, (*model.whole, *also)):
            yield name, full_shape(parameter).numel(), before.get(name, parameter.requires_grad)


def _around(name: str) -> Iterator[str]:
    """Yield the names of the modules around ``name``, but for the model itself."""
    while name := name.rpartition(".")[0]:
        yield name


def _original(model: ModelView, root: str, free: Iterable[str]) -> str | None:
    """Return another module, of which something is trained, that is of the same class and has the same parameters.

    The blocks of a list are no copies of each other, and single layers only with the same values.
    """
    module, own = model.modules[root], model.part(root).parameters
    siblings = _list_around(model, root)
    for name in free:
        if type(model.modules[name]) is not type(module) or (siblings and _list_around(model, name) == siblings):
            continue
        theirs = model.part(name).parameters
        if {n: full_shape(p) for n, p in own.items()} != {n: full_shape(p) for n, p in theirs.items()}:
            continue
        if module._modules or all(not p.is_meta and torch.equal(whole(p), whole(theirs[n])) for n, p in own.items()):
            return name
    return None


def _list_around(model: ModelView, name: str) -> str | None:
    """Return the name of the list of modules that ``name`` stands in, if it stands in one."""
    parent = name.rpartition(".")[0]
    return parent if isinstance(model.modules[parent], nn.ModuleList | nn.Sequential) else None
