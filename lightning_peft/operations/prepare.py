"""What methods want of a model, worked out before anything in it changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_peft.core.adapter import CHILD, Adapter
from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError, listed
from lightning_peft.structure.frozen import frozen_apart
from lightning_peft.structure.kept import why_kept
from lightning_peft.structure.plain import obstacle
from lightning_peft.targets.patterns import Matcher, as_list, nothing_matched
from lightning_peft.tensors.packed import is_packed


@dataclass(frozen=True)
class Prepared:
    """What methods want of a model."""

    modules: dict[str, nn.Module]
    """The modules to adapt."""
    adapters: dict[str, Adapter]
    hosts: dict[str, int]
    """Position of the method, by module."""
    chosen: tuple[str, ...]
    """The parameters to train that no module trained whole holds."""
    methods: tuple[PEFTMethod, ...]
    whole: tuple[str, ...]
    """The modules to train whole, and parameters by themselves."""


def prepare(model: ModelView, methods: tuple[PEFTMethod, ...], whole: tuple[str, ...], seed: int) -> Prepared:
    """Make the adapters, in the model's order, without attaching them."""
    model.whole = whole
    inside = {id(part) for view in _modules(model, whole).values() for _, part in view.walked}
    modules: dict[str, nn.Module] = {}
    adapters: dict[str, Adapter] = {}
    owners: dict[str, int] = {}
    chosen: set[str] = set()
    for position, method in enumerate(methods):
        selected = method.select(model)
        hosts = {host: module for host, module in selected.items() if id(module) not in inside}
        trained = list(method.trained(model))
        if not (hosts or trained or method.everything):
            reason = "train_also trains every module that it selects whole" if selected else "it selects nothing"
            raise PEFTError(f"{type(method).__name__} has nothing to do in this {model.kind}: {reason}.")
        if twice := [host for host in hosts if host in owners]:
            other = methods[owners[twice[0]]]
            raise PEFTError(
                f"{type(other).__name__} and {type(method).__name__} would both adapt {twice[0]!r}; a module takes one "
                "adapter. Give one of them other target_modules, or exclude_modules."
            )
        modules.update(hosts)
        owners.update(dict.fromkeys(hosts, position))
        adapters.update(_made(model, method, hosts, seed) if hosts else {})
        chosen.update(trained)
    order = [host for host in model.modules if host in owners]
    chosen -= parameter_names(model, whole)
    names = [n for n in model.parameters if n in chosen] if chosen else []
    by_host = {h: adapters[h] for h in order}
    _keep_copies_frozen(model, by_host)
    return Prepared(modules, by_host, {h: owners[h] for h in order}, tuple(names), methods, whole)


def _made(model: ModelView, method: PEFTMethod, hosts: Mapping[str, nn.Module], seed: int) -> dict[str, Adapter]:
    """Return the adapters of ``method``, with it settled which of them can be merged.

    Raises:
        PEFTError: A host that ``method`` found by the model's structure cannot have one.
    """
    if reasons := [(name, reason) for name, host in hosts.items() if (reason := obstacle(host))]:
        raise PEFTError("{!r} cannot be adapted: {}. Name modules to adapt in target_modules.".format(*reasons[0]))
    made = method.adapters(model, hosts, seed)
    kept: dict[str, list[str]] = {}
    for name, adapter in made.items():
        if (reason := why_kept(hosts[name], adapter)) is not None:
            # A packed weight may be another by the time of a merge, which looks again.
            adapter.mergeable = is_packed(hosts[name])
            kept.setdefault(reason, []).append(f"{name!r} ({type(hosts[name]).__name__})")
    for reason, names in kept.items():
        model.remark(
            f"{type(method).__name__}: the adapters of {listed(names)} cannot be merged and will stay attached. "
            f"Reason: {reason}."
        )
    return made


@torch.no_grad()
def _keep_copies_frozen(model: ModelView, adapters: Mapping[str, Adapter]) -> None:
    """Freeze the adapters of frozen copies, such as a teacher of its student, but for what they share with others.

    They start from the values that they have beside the original: the average of two that have nothing in common would
    be neither's.
    """
    originals = frozen_apart(model).copies
    copies = {host: adapter for host, adapter in adapters.items() if host in originals}
    trained = {id(p) for host, adapter in adapters.items() if host not in copies for p in adapter.parameters()}
    for host, adapter in copies.items():
        own = {name: tensor for name, tensor in adapter.state_dict(keep_vars=True).items() if id(tensor) not in trained}
        theirs = adapters[originals[host]].state_dict() if originals[host] in adapters else {}
        for name, tensor in own.items():
            tensor.requires_grad_(False)
            if name in theirs and theirs[name].shape == tensor.shape:
                tensor.copy_(theirs[name])
    if copies:
        model.remark(
            f"The adapters of {listed(map(repr, copies))} stay frozen: these modules are frozen copies of others."
        )


def prepared_tensors(model: ModelView, prepared: Prepared, name: str) -> dict[str, Tensor]:
    """Return the tensors that an adapter will have in ``model``, by name, and those of the model trained with it."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for host, adapter in prepared.adapters.items():
        for key, tensor in adapter.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                found[f"{host}.{CHILD}.{name}.{key}".lstrip(".")] = tensor
    return {**found, **changing_tensors(model, prepared.chosen, prepared.whole)}


def changing_tensors(model: ModelView, chosen: Iterable[str], whole: Iterable[str]) -> dict[str, Tensor]:
    """Return the tensors that change when the parameters ``chosen`` and what ``whole`` names are trained.

    Those are the parameters, running statistics beside them, and the whole state of modules.
    """
    parameters = {*chosen, *parameter_names(model, whole)}
    if not parameters:
        return {}
    norms = {
        name
        for name, module in model.modules.items()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        if any(f"{name}.{parameter}".lstrip(".") in parameters for parameter in module._parameters)
    }
    buffers = {f"{prefix}.{n}".lstrip(".") for prefix, view in _modules(model, whole).items() for n in view.buffers}
    state = {**model.buffers, **model.parameters}
    return {n: t for n, t in state.items() if n in parameters or n in buffers or n.rpartition(".")[0] in norms}


def whole_names(model: ModelView, patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the outermost modules that ``patterns`` (``train_also``) name, and parameters where they name no module.

    Raises:
        PEFTError: A pattern matches nothing, or a module has no parameters, or shares one with a module outside.
    """
    patterns = as_list(patterns)
    if not patterns:
        return ()
    # Not the model itself: nothing would be left to adapt.
    modules = {name: module for name, module in model.modules.items() if name}
    parameters, names = model.parameters, set[str]()
    of_modules, of_aliases, of_parameters = Matcher(modules), Matcher(model.aliases), Matcher(parameters)
    for pattern in patterns:
        found = of_modules(pattern) | {model.aliases[alias] for alias in of_aliases(pattern)} or of_parameters(pattern)
        if not found:
            # Parameters of layers are named by the layer.
            bare = {
                name: p for name, p in parameters.items() if model.part(name.rpartition(".")[0]).modules.keys() > {""}
            }
            raise PEFTError(nothing_matched(pattern, {**modules, **bare}, {**modules, **bare}, what="train_also"))
        names |= found
    outermost = [n for n in modules if n in names and not any(n.startswith(f"{o}.") for o in names)]
    inside = parameter_names(model, outermost)
    alone = [name for name in parameters if name in names and name not in inside]
    _refuse_packed(model, outermost, alone)
    if empty := [name for name in outermost if not model.part(name).parameters]:
        kind = type(modules[empty[0]]).__name__
        raise PEFTError(f"train_also: {empty[0]!r} ({kind}) has no parameters to train.")
    _refuse_shared(model, [*outermost, *alone])
    return (*outermost, *alone)


def _refuse_packed(model: ModelView, whole: Sequence[str], alone: Sequence[str]) -> None:
    inside = [f"{name}.{part}".rstrip(".") for name in whole for part in model.part(name).modules]
    owners = [name.rpartition(".")[0] for name in alone if name.rpartition(".")[2] == "weight"]
    if packed := next((name for name in (*inside, *owners) if is_packed(model.modules[name])), None):
        raise PEFTError(
            f"train_also: the weight of {packed!r} is quantised, so it cannot be trained whole. Leave it out of what "
            "is quantised (ignore_modules, llm_int8_skip_modules, modules_to_not_convert), or adapt it by naming it in "
            "target_modules."
        )


def _refuse_shared(model: ModelView, whole: Sequence[str]) -> None:
    owners: dict[int, set[str]] = {}
    for module_name, module in model.modules.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(module_name)
    parts = _modules(model, whole)
    for name in whole:
        owner = name if name in parts else name.rpartition(".")[0]
        for parameter in parts[name].parameters.values() if name in parts else [model.parameters[name]]:
            outside = [o for o in owners[id(parameter)] if o != owner and not o.startswith(f"{name}.")]
            if outside:
                raise PEFTError(
                    f"train_also: {name!r} shares a parameter with {outside[0]!r}, which would be trained with it. "
                    "Untie them first, or adapt the module by naming it in target_modules."
                )


def parameter_names(model: ModelView, whole: Iterable[str]) -> set[str]:
    """Return the full names of all parameters of the modules ``whole``, and of the parameters among them."""
    whole = list(whole)
    modules = _modules(model, whole)
    inside = {f"{prefix}.{name}".lstrip(".") for prefix, view in modules.items() for name in view.parameters}
    return inside | {name for name in whole if name not in modules}


def _modules(model: ModelView, whole: Iterable[str]) -> dict[str, ModelView]:
    return {name: model.part(name) for name in whole if name in model.modules}
