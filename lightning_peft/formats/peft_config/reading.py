"""A configuration object of HF PEFT, such as ``peft.LoraConfig(...)``, as methods; HF PEFT itself is not imported."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from lightning_peft.core.method import PEFTMethod
from lightning_peft.errors import PEFTError
from lightning_peft.formats.hf import HEADS
from lightning_peft.formats.keys import OFF
from lightning_peft.formats.peft_config.fields import FIELDS, READ_BY_HAND, WITHOUT_EFFECT, Fields, plain
from lightning_peft.methods.bitfit import BitFit
from lightning_peft.methods.new_tokens import NewTokens
from lightning_peft.targets.patterns import ALL_LINEAR, as_list

_DRAWN = {True: "kaiming", "gaussian": "gaussian"}
"""How A is drawn, by HF PEFT's name of it."""


def is_peft_config(given: Any) -> TypeGuard[Any]:
    """Whether ``given`` is an object of HF PEFT's that describes an adapter."""
    ours = any(kind.__module__.partition(".")[0] == "peft" for kind in type(given).__mro__)
    return ours and dataclasses.is_dataclass(given) and not isinstance(given, type) and hasattr(given, "peft_type")


def from_peft_config(config: Any) -> tuple[list[PEFTMethod], list[str]]:
    """Return what a configuration of HF PEFT describes, for a model that has no adapters yet.

    Targets mean the same modules as to HF PEFT, with one exception that a warning names: where a LoRA or the like
    leaves them out, HF PEFT takes a list of its own for the model's architecture, and this package every linear layer.
    A regular expression may also match the end of a name: HF PEFT would be given a part of the module alone.

    Args:
        config: An object such as ``peft.LoraConfig(r=16, target_modules=["q_proj", "v_proj"])``.

    Returns:
        The methods, which make one adapter together, as ``PEFTStrategy`` and ``inject`` take them; and the patterns of
        modules to train whole, as their ``train_also`` takes them: ``modules_to_save``, and the head that HF PEFT
        implies by ``task_type``.

    Raises:
        PEFTError: It is no such object, this package does not have the method, or a field asks for something that it
            does not have.
    """
    if not is_peft_config(config):
        raise PEFTError(f"{config!r} was given; a configuration of HF PEFT, such as peft.LoraConfig(), was expected.")
    name = type(config).__name__
    values = {entry.name: plain(getattr(config, entry.name)) for entry in dataclasses.fields(config)}
    kind = str(values["peft_type"])
    fields = FIELDS.get("DORA" if values.get("use_dora") else kind)
    if fields is None:
        known = ", ".join(sorted({*FIELDS} - {"DORA"}))
        raise PEFTError(f"{name} describes {kind}, which this package does not have. What it has: {known}.")
    _refuse_others(config, values, fields)
    given = {ours: values[theirs] for theirs, ours in fields.renamed.items()}
    given |= {same: values[same] for same in fields.same if same in values}
    given |= _where(values, fields, name) | _patterns(values, fields, name) | _start(values, kind, name)
    given = {key: value for key, value in given.items() if value is not None}
    return [fields.method(**given), *_beside(values, given, name)], _whole(values)


def without_peft_configs(given: Any) -> tuple[Any, list[str]]:
    """Return what a user gave as a method or several, with methods in place of HF PEFT's configurations.

    Returns:
        The methods, and the patterns of modules that the configurations train whole.

    Raises:
        PEFTError: As :func:`from_peft_config`.
    """
    entries = list(given) if isinstance(given, list | tuple) else [given]
    if not any(map(is_peft_config, entries)):
        return given, []
    read = [from_peft_config(entry) if is_peft_config(entry) else ([entry], []) for entry in entries]
    return [method for methods, _ in read for method in methods], [name for _, whole in read for name in whole]


def _refuse_others(config: Any, values: Mapping[str, Any], fields: Fields) -> None:
    """Raise :class:`PEFTError` if a field that nothing here corresponds to has another value than it has by itself."""
    known = {*fields.same, *fields.renamed, *fields.without_effect, *WITHOUT_EFFECT, *READ_BY_HAND}
    for entry in dataclasses.fields(config):
        value = values[entry.name]
        default = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
        unset = value == plain(default) or (value in OFF and plain(default) in OFF)
        if entry.name not in known and not unset:
            raise PEFTError(
                f"{type(config).__name__} has {entry.name}={value!r}, which {fields.method.__name__} does not have: "
                "something else would be trained. Leave it out, or train with HF PEFT and load the adapter."
            )


def _where(values: Mapping[str, Any], fields: Fields, name: str) -> dict[str, Any]:
    targets = values.get("target_modules")
    parameters = values.get("target_parameters") or []
    if not targets and not parameters:
        if getattr(fields.method, "target_modules", None) == ALL_LINEAR:
            warnings.warn(
                f"{name} leaves target_modules out: HF PEFT would take a list of its own for the model's architecture, "
                "often two of attention's layers. Here every linear layer is adapted. Name the modules to choose.",
                stacklevel=4,
            )
        return _limits(values)
    named = targets if targets == ALL_LINEAR else _names(targets)
    if parameters:
        named = [*as_list(named), *parameters]
    return {"target_modules": named, **_limits(values)}


def _limits(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is said of some of the targets alone."""
    limits: dict[str, Any] = {
        key: _names(values[key]) for key in ("exclude_modules", "feedforward_modules") if values.get(key)
    }
    if (layers := values.get("layers_to_transform")) not in (None, []):
        limits["layers"] = [layers] if isinstance(layers, int) else list(layers)
    return limits


def _names(given: str | Sequence[str] | None) -> list[str] | str:
    """Return HF PEFT's names, which are ours, or its regular expression for a whole name."""
    return f"re:{_anywhere(given)}" if isinstance(given, str) else list(given or ())


def _anywhere(expression: str) -> str:
    return rf"(?:.*\.)?(?:{expression})"


def _patterns(values: Mapping[str, Any], fields: Fields, name: str) -> dict[str, Any]:
    """Return ranks and alphas of some modules; HF PEFT reads the keys as regular expressions for the end of a name."""
    found = {}
    for key in ("rank_pattern", "alpha_pattern"):
        if not (table := values.get(key)):
            continue
        if not any(entry.name == key for entry in dataclasses.fields(fields.method)):  # type: ignore[arg-type]
            raise PEFTError(f"{name} has {key}={table!r}, which {fields.method.__name__} does not have here.")
        found[key] = {_pattern(pattern): value for pattern, value in table.items()}
    return found


def _pattern(key: str) -> str:
    return key if key.replace(".", "").replace("_", "").isalnum() else f"re:{_anywhere(key)}"


def _start(values: Mapping[str, Any], kind: str, name: str) -> dict[str, Any]:
    """Return where the values of a new adapter begin."""
    if kind == "PROMPT_TUNING":
        return _prompt(values)
    if kind == "MISS":
        return _shards(values, name)
    init = values.get("init_lora_weights", True)
    if (kind == "ADALORA" and init is True) or kind != "LORA":
        return {}
    if init is True or init == "gaussian":
        return {"init": _DRAWN[init]}
    if isinstance(init, str) and (init == "olora" or init.startswith("pissa")):
        return {"init": init}
    raise PEFTError(
        f"{name} has init_lora_weights={init!r}; True, 'gaussian', 'pissa', 'pissa_niter_N' and 'olora' can be read."
    )


def _shards(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    if values["init_weights"] not in (True, "mini"):
        raise PEFTError(f"{name} has init_weights={values['init_weights']!r}; True and 'mini' can be read.")
    return {"mini_r": values["mini_r"]} if values["init_weights"] == "mini" else {}


def _prompt(values: Mapping[str, Any]) -> dict[str, Any]:
    start = values.get("prompt_tuning_init")
    if start == "TEXT":
        text, tokenizer = values["prompt_tuning_init_text"], values["tokenizer_name_or_path"]
        return {"init_text": text, "tokenizer_name_or_path": tokenizer}
    return {"init": "vocabulary" if start == "SAMPLE_VOCAB" else "random"}


def _beside(values: Mapping[str, Any], given: Mapping[str, Any], name: str) -> list[PEFTMethod]:
    """Return what is trained beside the method: biases, and rows of embeddings."""
    beside: list[PEFTMethod] = []
    bias = values.get("bias", "none")
    if str(bias).endswith("_only"):
        beside.append(BitFit(target_modules=given.get("target_modules", ALL_LINEAR)))
    elif bias == "all":
        beside.append(BitFit())
    elif bias != "none":
        raise PEFTError(f"{name} has bias={bias!r}; 'none', 'all' or 'lora_only' was expected.")
    rows = values.get("trainable_token_indices") or {}
    if isinstance(rows, Mapping):
        beside += [NewTokens(token_indices=list(tokens), target_modules=[part]) for part, tokens in rows.items()]
    else:
        beside.append(NewTokens(token_indices=list(rows)))
    return beside


def _whole(values: Mapping[str, Any]) -> list[str]:
    """Return the patterns of modules that are trained whole."""
    named = list(values.get("modules_to_save") or ())
    heads = [head for head in HEADS.get(str(values.get("task_type")), ()) if head not in named]
    return [*named, f"re:{_anywhere('|'.join(heads))}"] if heads else named
