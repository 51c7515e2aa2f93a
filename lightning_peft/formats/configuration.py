"""The JSON of an adapter directory, each value checked against the type that it is to have before it is used."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_peft.core.schema import check_values, is_json
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.files.contents import MARKER, read_json
from lightning_peft.formats.content import CONFIG_FILE

_Names = str | list[str] | None
_Ranks = dict[str, int | list[bool]] | None
_Switch = bool | None

_OF_CONFIG: Mapping[str, Any] = {
    **dict.fromkeys(("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern"), _Names),
    **dict.fromkeys(("modules_to_save", "target_parameters"), list[str] | None),
    **dict.fromkeys(("peft_type", "task_type", "base_model_name_or_path", "revision", "peft_version"), str | None),
    **dict.fromkeys(("r", "init_r", "target_r", "tinit", "tfinal", "deltaT"), int),
    **dict.fromkeys(("num_virtual_tokens", "projection_prng_key", "decompose_factor"), int),
    **dict.fromkeys(("oft_block_size", "num_cayley_neumann_terms", "mini_r"), int),
    **dict.fromkeys(("total_step", "encoder_hidden_size", "num_layers", "token_dim"), int | None),
    **dict.fromkeys(("lora_alpha", "alpha", "beta1", "beta2", "orth_reg_weight", "d_initial"), float),
    **dict.fromkeys(("lora_dropout", "vera_dropout", "miss_dropout", "rank_dropout", "module_dropout"), float),
    **dict.fromkeys(("use_dora", "use_rslora", "fan_in_fan_out", "prefix_projection", "decompose_both"), _Switch),
    **dict.fromkeys(
        ("save_projection", "inference_mode", "use_effective_conv2d", "block_share", "use_cayley_neumann"), _Switch
    ),
    "rank_pattern": _Ranks,
    "alpha_pattern": dict[str, float] | None,
    "layers_to_transform": int | list[int] | None,
    "bias": str | None,
    # Of this package's own format.
    "methods": list[dict[str, Any]],
    "train_also": list[str],
}
_OF_MARKER: Mapping[str, Any] = {
    "version": int,
    "prefix": str,
    "parts": list[str],
    "extra": list[str],
    "lightning": bool,
    "exported": str,
    "base": dict[str, Any],
}
_OF_BASE: Mapping[str, Any] = {
    "class": str,
    "name_or_path": str | None,
    **dict.fromkeys(("samples", "frozen", "others"), dict[str, list[float]]),
}
_OF_INJECTION: Mapping[str, Any] = {
    "adapters": dict[str, list[dict[str, Any]]],
    "active": str | None,
    **dict.fromkeys(("train_also", "moved", "frozen"), list[str]),
}

_SNAPSHOT = re.compile(r"models--[^/]+/snapshots/([0-9a-f]{40})/?$")
_MOST_PATTERNS = 1000
"""Patterns are tried one after another on the name of every adapted module."""


def named_base(root: ModelView) -> dict[str, str | None]:
    """Return what a configuration says of where the base came from: its name, and its commit where that is known."""
    config = getattr(root.module, "config", None)
    name = getattr(config, "_name_or_path", None) or None
    # transformers keeps the commit of what it loads in no place any more, but for the path of a hub's cache.
    of_cache = _SNAPSHOT.search(str(name))
    commit = getattr(config, "_commit_hash", None) or (of_cache and of_cache[1]) or None
    return {"base_model_name_or_path": name, "revision": commit}


def read_config(directory: Path) -> dict[str, Any]:
    """Read ``adapter_config.json``.

    Raises:
        PEFTError: It is missing or damaged, or a value has another type than HF PEFT or this package gives it.
    """
    config = read_json(directory / CONFIG_FILE)
    check_values(config, _OF_CONFIG, str(directory / CONFIG_FILE))
    return config


def read_marker(directory: Path) -> dict[str, Any]:
    """Read what this package says of a directory; nothing, if another program wrote it.

    Raises:
        PEFTError: It is damaged.
    """
    path = directory / MARKER
    if not path.is_file():
        return {}
    marker = read_json(path)
    check_values(marker, _OF_MARKER, str(path))
    check_base(marker.get("base", {}), f"{path}: the base")
    return marker


def check_base(base: Any, what: str) -> None:
    """Check what was written of a base model.

    Raises:
        PEFTError: It is damaged.
    """
    if not isinstance(base, Mapping):
        raise PEFTError(f"{what} is damaged: a mapping was expected. Take another copy.")
    check_values(base, _OF_BASE, what)


def check_injection(injection: Mapping[str, Any], what: str) -> None:
    """Check what a checkpoint says of the adapters of one part of a model.

    Raises:
        PEFTError: It is damaged.
    """
    check_values(injection, _OF_INJECTION, what)
    if not is_json(injection["adapters"]):
        raise PEFTError(f"{what} is damaged: configurations of adapters are text and numbers. Take another copy.")
    check_base(injection["base"], f"{what}: the base")


def refuse_many_patterns(patterns: Mapping[str, Any], names: Mapping[str, Any], source: str) -> None:
    """Raise :class:`PEFTError` if more of ``patterns`` are to be tried than can be in reasonable time.

    Those that are one of ``names`` are found at once.
    """
    if (number := len(patterns.keys() - names.keys())) > _MOST_PATTERNS:
        raise PEFTError(
            f"{source}: its configuration has {number} patterns of modules; {_MOST_PATTERNS} is the limit, besides "
            "whole names."
        )
