"""A configuration object of HF PEFT, such as ``peft.LoraConfig(...)``, as methods; HF PEFT itself is not imported."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, TypeGuard

from lightning_peft.core.method import PEFTMethod
from lightning_peft.errors import PEFTError
from lightning_peft.formats.hf import HEADS
from lightning_peft.formats.keys import OFF
from lightning_peft.formats.peft_config.fields import FIELDS, READ_BY_HAND, WITHOUT_EFFECT, Fields, plain
from lightning_peft.formats.peft_config.places import patterns, where
from lightning_peft.methods.bitfit import BitFit
from lightning_peft.methods.new_tokens import NewTokens
from lightning_peft.targets.patterns import ALL_LINEAR

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
    A regular expression may also match the end of a name, from a dot on: HF PEFT would be given a part of the module
    alone. One that looks around itself, as in ``(?!.*vision).*q_proj``, is matched with whole names.

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
    _refuse_frozen(values, name)
    _refuse_others(config, values, fields)
    given = {ours: values[theirs] for theirs, ours in fields.renamed.items()}
    given |= {same: values[same] for same in fields.same if same in values}
    given |= where(values, fields, name) | patterns(values, fields, name) | _start(values, kind, name)
    given = {key: value for key, value in given.items() if value is not None}
    return [fields.method(**given), *_beside(values, given, name)], _whole(values)


def _refuse_frozen(values: Mapping[str, Any], name: str) -> None:
    if values.get("inference_mode"):
        raise PEFTError(
            f"{name} has inference_mode=True, as PeftConfig.from_pretrained sets it: HF PEFT would train nothing. Set "
            "config.inference_mode = False to train a new adapter, or give PEFTStrategy the old one as init_adapter."
        )


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


def _start(values: Mapping[str, Any], kind: str, name: str) -> dict[str, Any]:
    """Return where the values of a new adapter begin."""
    if kind == "PROMPT_TUNING":
        return _prompt(values)
    if kind == "MISS":
        return _shards(values, name)
    init = values.get("init_lora_weights", True)
    if kind != "LORA":
        if init is not True:
            raise PEFTError(f"{name} has init_lora_weights={init!r}; True can be read.")
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
        raise PEFTError(
            f"{name} has init_weights={values['init_weights']!r}; here are True and 'mini'. Leave it "
            "out, or train with HF PEFT and merge it there."
        )
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
        beside.append(_biases(given, f"{name} has bias={bias!r}"))
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


def _biases(given: Mapping[str, Any], said: str) -> BitFit:
    """Return the training of the adapted modules' biases, where patterns alone say which modules these are."""
    targets = given.get("target_modules", ALL_LINEAR)
    if targets == ALL_LINEAR or given.get("layers") or given.get("exclude_modules"):
        raise PEFTError(
            f"{said} beside modules that are not told by target_modules alone. Name them there, all of them and no "
            r"others, such as '.*\.layer\.[01]\..*\.(query|value)', or train with HF PEFT and load the adapter."
        )
    return BitFit(target_modules=targets)


def _whole(values: Mapping[str, Any]) -> list[str]:
    """Return the patterns of modules that are trained whole: HF PEFT takes ends of names, also in a word's middle."""
    named = list(values.get("modules_to_save") or ())
    heads = [head for head in HEADS.get(str(values.get("task_type")), ()) if head not in named]
    expressions = [*map(re.escape, named), *(["|".join(heads)] if heads else [])]
    return [f"re:.*(?:{expression})" for expression in expressions]
