"""Where HF PEFT's configurations put adapters, in the words of this package's patterns."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_peft.errors import PEFTError
from lightning_peft.formats.peft_config.fields import Fields
from lightning_peft.targets.patterns import ALL_LINEAR, PRESETS, as_list

_LOOKS_AROUND = ("(?=", "(?!", "(?<=", "(?<!")
"""What makes a regular expression mean other modules where it begins in the middle of a name."""


def where(values: Mapping[str, Any], fields: Fields, name: str) -> dict[str, Any]:
    """Return which modules are adapted.

    Raises:
        PEFTError: HF PEFT would take a list of its own, or what it would take cannot be said here.
    """
    targets = values.get("target_modules")
    parameters = values.get("target_parameters") or []
    if not targets and not parameters:
        if targets is not None:
            raise PEFTError(f"{name} has target_modules={targets!r}, which names no module. Name those to adapt.")
        if getattr(fields.method, "target_modules", None) == ALL_LINEAR:
            warnings.warn(
                f"{name} leaves target_modules out: HF PEFT would take a list of its own for the model's architecture, "
                "often two of attention's layers. Here every linear layer is adapted. Name the modules to choose.",
                stacklevel=4,
            )
        return _limits(values, name)
    if "feedforward_modules" in values and values["feedforward_modules"] is None:
        raise PEFTError(
            f"{name} names target_modules and leaves feedforward_modules out, for which HF PEFT has a list of its own "
            "for the model's architecture. Name those of the targets whose input is rescaled; [] is none."
        )
    if parameters and values.get("layers_to_transform") not in (None, []):
        raise PEFTError(
            f"{name} has target_parameters beside layers_to_transform, which HF PEFT applies to modules alone. Leave "
            "one of them out, or write the layers' numbers into target_parameters."
        )
    named = ALL_LINEAR if isinstance(targets, str) and targets.lower() == ALL_LINEAR else _names(targets)
    if parameters:
        named = [*as_list(named), *parameters]
    return {"target_modules": named, **_limits(values, name)}


def _limits(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return what is said of some of the targets alone.

    Raises:
        PEFTError: HF PEFT would leave out nothing of what is excluded.
    """
    excluded, targets = values.get("exclude_modules"), values.get("target_modules")
    if excluded and not isinstance(excluded, str):
        # There a name of a list is that of a layer; here what is in a module of that name is left out as well.
        listing = targets if targets and not isinstance(targets, str) else None
        idle = [] if listing is None else [e for e in excluded if not any(_may_be_one(e, t) for t in listing)]
        if idle:
            raise PEFTError(
                f"{name} has exclude_modules={sorted(excluded)!r}, where {min(idle)!r} is the name of none of its "
                "target_modules: HF PEFT leaves out layers of such a name, not what is in a module of that name: it "
                f"does nothing there. Leave it out, or give a regular expression, exclude_modules='.*{min(idle)}.*'."
            )
        if listing is None:
            warnings.warn(
                f"{name} has exclude_modules={sorted(excluded)!r}: to HF PEFT these are names of layers; here what is "
                "in a module of such a name is left out as well. Where they name layers, that is the same.",
                stacklevel=5,
            )
    limits: dict[str, Any] = {
        key: _names(values[key]) for key in ("exclude_modules", "feedforward_modules") if values.get(key)
    }
    if (layers := values.get("layers_to_transform")) not in (None, []):
        limits["layers"] = [layers] if isinstance(layers, int) else list(layers)
    return limits


def _may_be_one(one: str, other: str) -> bool:
    """Whether two ends of names may be ends of one name."""
    return f".{one}".endswith(f".{other}") or f".{other}".endswith(f".{one}")


def _names(given: str | Sequence[str] | None) -> list[str] | str:
    """Return HF PEFT's names, or its regular expression for a whole name, as patterns."""
    if not isinstance(given, str):
        return [_literal(name) for name in given or ()]
    return f"re:{given if any(look in given for look in _LOOKS_AROUND) else anywhere(given)}"


def _literal(name: str) -> str:
    """Return the pattern of a name, which to HF PEFT never is one of a group of layers, a glob or an expression."""
    return f"re:{anywhere(re.escape(name))}" if name in PRESETS or "*" in name or name.startswith("re:") else name


def anywhere(expression: str) -> str:
    """Return an expression that also matches the end of a name, from a dot on."""
    return rf"(?:.*\.)?(?:{expression})"


def patterns(values: Mapping[str, Any], fields: Fields, name: str) -> dict[str, Any]:
    """Return ranks and alphas of some modules; HF PEFT reads the keys as regular expressions for the end of a name."""
    found = {}
    for key in ("rank_pattern", "alpha_pattern"):
        if not (table := values.get(key)):
            continue
        if not any(entry.name == key for entry in dataclasses.fields(fields.method)):  # type: ignore[arg-type]
            raise PEFTError(f"{name} has {key}={table!r}, which {fields.method.__name__} does not have here.")
        # No plain names: here a module's full one goes before all other patterns, there the first that matches does.
        found[key] = {f"re:{anywhere(pattern)}": value for pattern, value in table.items()}
    return found
