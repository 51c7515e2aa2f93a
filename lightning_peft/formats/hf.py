"""HF PEFT's directories: what is the same for every method. The methods' own names are in ``counterparts``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn

from lightning_peft.core.adapter import Adapter
from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.formats import counterparts as _counterparts  # noqa: F401 (importing it registers them)
from lightning_peft.formats.content import Content, Part
from lightning_peft.formats.counterpart import PREFIX, Counterpart, for_config
from lightning_peft.structure.plain import is_weighted
from lightning_peft.targets.patterns import ALL_LINEAR, fullmatch

_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Modules that HF PEFT trains whole for a task; its configurations name them from release 0.9 on."""


def config_of(root: ModelView, part: Part, counterpart: Counterpart) -> dict[str, Any]:
    """Return ``adapter_config.json`` for the adapters of ``part`` on modules of ``root``."""
    name_or_path = getattr(getattr(root.module, "config", None), "_name_or_path", None)
    method = _method_of(root, part)
    return {
        "peft_type": counterpart.peft_type,
        "task_type": _task_type(root),
        "base_model_name_or_path": name_or_path or None,
        "inference_mode": True,
        "modules_to_save": part.train_also or None,
        **counterpart.config(root, method, part.hosts, part.chosen),
    }


def tensor_names(root: ModelView, part: Part, counterpart: Counterpart) -> dict[str, str]:
    """Return the name in the model, without the adapter's, by the name in the file."""
    return {
        **counterpart.names(root, _method_of(root, part), part.hosts, part.chosen),
        **{f"{PREFIX}{parameter}": parameter for parameter in part.whole},
    }


def read_content(
    root: ModelView, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], source: str
) -> Content:
    """Read a configuration and the tensors' names and shapes as an adapter of ``root``.

    Raises:
        PEFTError: HF PEFT's method has no counterpart here, the names fit no module of ``root``, or configuration and
            tensors contradict each other.
    """
    counterpart = for_config(config, source)
    for name in shapes:
        if not (name.startswith(PREFIX) or counterpart.owns(name)):
            raise PEFTError(f"{source}: the tensor {name!r} does not start with {PREFIX!r}; it is no HF PEFT file.")
    method = counterpart.read(root, config, shapes, source)
    rest = [name for name in shapes if not counterpart.owns(name)]
    train_also, copies = _whole(root, config, rest, source)
    whole = {name: name.removeprefix(PREFIX) for name in rest if name not in copies}
    chosen = [name for name in method.trained(root) if name not in whole.values()]
    hosts = list(method.select(root))
    _refuse_lost(root, config, {*hosts, *train_also}, source)
    again = {name: first for name, first in counterpart.repeats(root, method, hosts).items() if name in shapes}
    names = {**again, **counterpart.names(root, method, hosts, chosen), **whole}
    return Content((method,), train_also, names, copies)


def _method_of(root: ModelView, part: Part) -> PEFTMethod:
    """Return the method with names that are relative to ``root``, as those of the file are."""
    slots_of = {name: slot for name, _, slot in root.slots}
    return part.methods[0].within({host: cast(Adapter, slots_of[host][part.adapter]) for host in part.hosts})


def _task_type(root: ModelView) -> str | None:
    # The other task types make HF PEFT train classifier modules by name; these two only name an Auto class.
    name = root.kind
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    return "SEQ_2_SEQ_LM" if getattr(getattr(root.module, "config", None), "is_encoder_decoder", False) else None


def _refuse_lost(root: ModelView, config: Mapping[str, Any], present: set[str], source: str) -> None:
    """Check that the tensors are those of all modules that the configuration names.

    Raises:
        PEFTError: Those of one are not there.
    """
    targets = config.get("target_modules")
    if not targets or targets == ALL_LINEAR or config.get("layers_to_transform") is not None:
        return
    excluded = config.get("exclude_modules") or ()
    for name, module in root.modules.items():
        if not (is_weighted(module) or isinstance(module, nn.MultiheadAttention)):
            continue
        if _names(targets, name) and not _names(excluded, name) and present.isdisjoint(_ancestors(name)):
            raise PEFTError(
                f"{source}: its configuration says that {name!r} is adapted (target_modules={targets!r}), but there "
                "are no tensors for it. It is damaged, or for another base model."
            )


def _names(patterns: Any, name: str) -> bool:
    """Whether HF PEFT takes ``patterns`` for naming the module ``name``: a regular expression, or endings of names."""
    if isinstance(patterns, str):
        return fullmatch(patterns, name)
    return any(name == ending or name.endswith(f".{ending}") for ending in patterns)


def _whole(
    root: ModelView, config: Mapping[str, Any], rest: Sequence[str], source: str
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the modules trained whole, from ``modules_to_save`` and the tensors, and the copies of base parameters."""
    if not rest:
        return (), {}
    implied = _HEADS.get(str(config.get("task_type")), ())
    listed = [*map(str, config.get("modules_to_save") or ()), *implied]
    wanted, copies = set(), {}
    for in_file in rest:
        name = in_file.removeprefix(PREFIX)
        base = name.replace(".base_layer.", ".")
        module = name.rpartition(".")[0]
        if any(part.endswith(ending) for part in _ancestors(module) for ending in listed):
            wanted.add(name)
        elif root.parameter(base) is not None:
            copies[in_file] = base
        else:
            raise PEFTError(f"{source}: the tensor {in_file!r} belongs to no module of this {root.kind}.")
    found = [
        name
        for name, module in root.modules.items()
        if any(name.endswith(ending) for ending in listed)
        and (keys := {f"{name}.{key}" for key, _ in module.named_parameters()})
        and keys <= wanted
    ]
    return tuple(found), copies


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
