"""From modules back to patterns: the shortest that name them and no others."""

from __future__ import annotations

from collections.abc import Iterable

import regex

from lightning_peft.core.view import ModelView


def suffixes(hosts: Iterable[str], modules: Iterable[str]) -> list[str] | None:
    """Return the shortest list of name endings that names exactly ``hosts`` among ``modules``.

    Last segments if they do, else whole names, else ``None``. Readers that match by the last segment only (vLLM)
    need the first form.
    """
    hosts, modules = set(hosts), list(modules)
    for endings in ({host.rsplit(".", 1)[-1] for host in hosts}, hosts):
        named = {name for name in modules if name in endings or _ends_in(name, endings)}
        if named == hosts:
            return sorted(endings)
    return None


def targets_from(hosts: Iterable[str], root: ModelView) -> list[str] | str:
    """Return ``target_modules`` as this package reads it."""
    hosts = sorted(hosts)
    return suffixes(hosts, root.modules) or "re:" + "|".join(map(regex.escape, hosts))


def _ends_in(name: str, endings: set[str]) -> bool:
    while name := name.partition(".")[2]:
        if name in endings:
            return True
    return False
