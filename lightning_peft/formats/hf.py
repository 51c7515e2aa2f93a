"""HF PEFT's directories: what is the same for every method. The methods' own names are in ``counterparts``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn

from lightning_peft.core.adapter import Adapter
from lightning_peft.core.view import ModelView, is_inside
from lightning_peft.errors import PEFTError
from lightning_peft.formats import additions as _additions  # noqa: F401 (importing them registers what is in them)
from lightning_peft.formats import counterparts as _counterparts  # noqa: F401
from lightning_peft.formats.addition import Addition, Form, Used, additions_to
from lightning_peft.formats.configuration import named_base
from lightning_peft.formats.content import Content, Part
from lightning_peft.formats.counterpart import PREFIX, UNSAID, for_config
from lightning_peft.formats.keys import refuse_values, warn_of_unknown
from lightning_peft.formats.pieces import whole_of
from lightning_peft.structure.plain import is_weighted
from lightning_peft.targets.patterns import ALL_LINEAR, endings, fullmatch

HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Modules that HF PEFT trains whole for a task; its configurations name them from release 0.9 on."""


def config_of(root: ModelView, part: Part, form: Form) -> dict[str, Any]:
    """Return ``adapter_config.json`` for the adapters of ``part`` on modules of ``root``."""
    used = _used(root, part)
    main = used[form.main]
    return {
        "peft_type": form.counterpart.peft_type,
        "task_type": _task_type(root),
        **named_base(root),
        "inference_mode": True,
        "modules_to_save": part.train_also or None,
        **form.counterpart.config(root, main.method, main.hosts, part.chosen),
        **{
            addition.key: addition.value(root, main, [used[i] for i in at], part.chosen)
            for addition, at in form.added.items()
        },
    }


def tensor_names(root: ModelView, part: Part, form: Form) -> dict[str, str]:
    """Return the name in the model, without the adapter's, by the name in the file."""
    used = _used(root, part)
    main = used[form.main]
    names = form.counterpart.names(root, main.method, main.hosts, part.chosen)
    for addition, at in form.added.items():
        names |= addition.names(root, main, [used[i] for i in at], part.chosen)
    return {**names, **{f"{PREFIX}{parameter}": parameter for parameter in part.whole}}


def read_content(
    root: ModelView, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], source: str
) -> Content:
    """Read a configuration and the tensors' names and shapes as an adapter of ``root``.

    Raises:
        PEFTError: HF PEFT's method has no counterpart here, the names fit no module of ``root``, or configuration and
            tensors contradict each other.
    """
    counterpart = for_config(config, source)
    refuse_values(config, counterpart.plain, counterpart.method.__name__, source)
    warn_of_unknown(config, {*counterpart.keys, *counterpart.plain, UNSAID}, source)
    # Of modules trained whole there is a frozen original, of which HF PEFT writes the bias if biases are trained, and
    # then their own bias twice.
    unused = frozenset(name for name in shapes if ".original_module." in name or ".modules_to_save." in name)
    shapes = {name: shape for name, shape in shapes.items() if name not in unused}
    if pieces := [name for name in shapes if whole_of(name) != name]:
        raise PEFTError(f"{source}: the tensor {pieces[0]!r} is named as no tensor of a file is. It is damaged.")
    main = Used(method := counterpart.read(root, config, shapes, source), list(method.select(root)))
    rest = [name for name in shapes if not counterpart.owns(name)]
    if strange := [name for name in rest if not name.startswith(PREFIX)]:
        raise PEFTError(f"{source}: the tensor {strange[0]!r} does not start with {PREFIX!r}; it is no HF PEFT file.")
    added: dict[Addition, list[Used]] = {}
    for addition in additions_to(counterpart):
        of_it = [n for n in rest if addition.owns(config, n) and not _in_listed(n.removeprefix(PREFIX), config)]
        read = addition.read(root, config, of_it, shapes, source)
        added[addition] = [Used(other, list(other.select(root))) for other in read]
        rest = [name for name in rest if name not in of_it]
    train_also, copies = _whole(root, config, rest, source)
    whole = {name: name.removeprefix(PREFIX) for name in rest if name not in copies}
    methods = (method, *(used.method for others in added.values() for used in others))
    chosen = [name for each in methods for name in each.trained(root) if name not in whole.values()]
    repeats = counterpart.repeats(root, method, main.hosts)
    again = {name: first for name, first in repeats.items() if name in shapes}
    names = {**again, **counterpart.names(root, method, main.hosts, chosen), **whole}
    for addition, others in added.items():
        names |= addition.names(root, main, others, chosen) if others else {}
    trained = {name.rpartition(".")[0] for name in method.trained(root)}
    _refuse_lost(root, config, {*main.hosts, *train_also}, trained, source)
    tied = [host for host in main.hosts if any(name.startswith(f"{PREFIX}{host}.") for name in repeats)]
    _refuse_unnamed(root, config, [host for host in main.hosts if host not in tied], source)
    return Content(methods, train_also, names, copies, unused)


def _used(root: ModelView, part: Part) -> list[Used]:
    """Return the methods with names that are relative to ``root``, as those of the file are."""
    slots_of = {name: slot for name, _, slot in root.slots}
    found = []
    for position, method in enumerate(part.methods):
        hosts = [host for host, owner in part.hosts.items() if owner == position]
        own = method.within({host: cast(Adapter, slots_of[host][part.adapter]) for host in hosts})
        found.append(Used(own, hosts))
    return found


def _task_type(root: ModelView) -> str | None:
    # The other task types make HF PEFT train classifier modules by name; these two only name an Auto class.
    name = root.kind
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    encoder_decoder = getattr(getattr(root.module, "config", None), "is_encoder_decoder", False)
    # With it HF PEFT gives the model `input_ids` and no other input.
    return "SEQ_2_SEQ_LM" if encoder_decoder and getattr(root.module, "main_input_name", "") == "input_ids" else None


def _refuse_lost(root: ModelView, config: Mapping[str, Any], present: set[str], trained: set[str], source: str) -> None:
    """Check that the tensors are those of all modules that the configuration names.

    Args:
        root: The model.
        config: The configuration.
        present: Modules that adapters or whole modules are there for.
        trained: Modules of which the method trains parameters; then it is those of their kind that are named.
        source: What is read, for the error.

    Raises:
        PEFTError: Those of one are not there.
    """
    if (targets := _targets(config)) is None or config.get("layers_to_transform") is not None:
        return
    excluded = config.get("exclude_modules") or ()
    excluded = excluded if isinstance(excluded, str) else frozenset(excluded)
    kinds: tuple[type, ...] = (nn.MultiheadAttention, *{type(root.modules[name]) for name in trained})
    for name, module in root.modules.items():
        if not (is_weighted(module) or isinstance(module, kinds)):
            continue
        if _names(targets, name) and not _names(excluded, name) and not is_inside(name, present | trained):
            raise PEFTError(
                f"{source}: its configuration says that {name!r} is adapted (target_modules="
                f"{config['target_modules']!r}), but there are no tensors for it. It is damaged, or for another base "
                "model."
            )


def _refuse_unnamed(root: ModelView, config: Mapping[str, Any], hosts: Sequence[str], source: str) -> None:
    """Check that the configuration names every module that there are tensors for: HF PEFT would pass others over.

    A pattern that names no module is none of a file's faults: what it was to train, it did not find.

    Raises:
        PEFTError: It does not name one.
    """
    if (targets := _targets(config)) is None or config.get("target_parameters"):
        return
    for host in hosts:
        if is_weighted(root.modules[host]) and not _names(targets, host):
            raise PEFTError(
                f"{source} has tensors for {host!r}, which its configuration does not name (target_modules="
                f"{config['target_modules']!r}): HF PEFT would not load them. It is damaged."
            )


def _targets(config: Mapping[str, Any]) -> str | frozenset[str] | None:
    """Return the patterns of ``target_modules``, if there are any, and not the one for all linear layers."""
    targets = config.get("target_modules")
    if not targets or (isinstance(targets, str) and targets.lower() == ALL_LINEAR):
        return None
    return targets if isinstance(targets, str) else frozenset(targets)


def _names(patterns: str | frozenset[str], name: str) -> bool:
    """Whether HF PEFT takes ``patterns`` for naming the module ``name``: a regular expression, or endings of names."""
    if isinstance(patterns, str):
        return fullmatch(patterns, name)
    return any(ending in patterns for ending in endings(name))


def _whole(
    root: ModelView, config: Mapping[str, Any], rest: Sequence[str], source: str
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the modules trained whole, from ``modules_to_save`` and the tensors, and the copies of base parameters."""
    if not rest:
        return (), {}
    wanted, copies = set(), {}
    for in_file in rest:
        name = in_file.removeprefix(PREFIX)
        base = name.replace(".base_layer.", ".")
        if _in_listed(name, config):
            wanted.add(name)
        elif root.parameter(base) is not None:
            copies[in_file] = base
        else:
            raise PEFTError(f"{source}: the tensor {in_file!r} belongs to no module of this {root.kind}.")
    found = [
        name
        for name, module in root.modules.items()
        if any(name.endswith(ending) for ending in _listed(config))
        and (keys := {f"{name}.{key}" for key, _ in module.named_parameters()})
        and keys <= wanted
    ]
    return tuple(found), copies


def _listed(config: Mapping[str, Any]) -> list[str]:
    """Return endings of names of modules trained whole."""
    return [*map(str, config.get("modules_to_save") or ()), *HEADS.get(str(config.get("task_type")), ())]


def _in_listed(parameter: str, config: Mapping[str, Any]) -> bool:
    listed = _listed(config)
    return any(part.endswith(ending) for part in _ancestors(parameter.rpartition(".")[0]) for ending in listed)


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
