"""From modules back to patterns: the shortest that name them and no others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import regex

from lightning_peft.core.view import ModelView

V = TypeVar("V")


def suffixes(hosts: Iterable[str], modules: Iterable[str]) -> list[str] | None:
    """Return the shortest list of name endings that names exactly ``hosts`` among ``modules``.

    Last segments if they do, else whole names, else ``None``. Readers that match by the last segment only (vLLM)
    need the first form.
    """
    hosts, modules = set(hosts), list(modules)
    for endings in ({host.rsplit(".", 1)[-1] for host in hosts}, hosts):
        depths = {ending.count(".") + 1 for ending in endings}
        named = {name for name in modules if any(_last(name, depth) in endings for depth in depths)}
        if named == hosts:
            return sorted(endings)
    return None


def targets_from(hosts: Iterable[str], root: ModelView) -> list[str] | str:
    """Return ``target_modules`` as this package reads it."""
    hosts = sorted(hosts)
    return suffixes(hosts, root.modules) or "re:" + "|".join(map(regex.escape, hosts))


def exceptions(values: Mapping[str, V], default: V, only: Callable[[str], str]) -> dict[str, V]:
    """Return those of ``values``, by the module's name, that are not ``default``, by a pattern for that module alone.

    Args:
        values: By name, of all modules that a pattern might name.
        default: What holds where no pattern says otherwise.
        only: Makes a pattern that matches no longer name, where the name itself would.
    """
    longer = {ending for name in values for ending in _endings(name)}
    return {only(name) if name in longer else name: value for name, value in values.items() if value != default}


def only_here(name: str) -> str:
    """Return a pattern of this package for the module ``name`` and none whose name ends in it."""
    return f"re:{regex.escape(name)}"


def _endings(name: str) -> Iterable[str]:
    while name := name.partition(".")[2]:
        yield name


def _last(name: str, depth: int) -> str:
    """Return the last ``depth`` segments of ``name``, or all of it."""
    return ".".join(name.rsplit(".", depth)[-depth:])
