"""Modules by the names that they had in release 0.1, which stand in users' code, configurations and pickles.

``lightning_peft.adapter`` is ``lightning_peft.core.adapter``: the same module, imported when it is asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_PACKAGE = "lightning_peft"
_ROOMS = {
    "tensors": "seeding shadow sharding weights",
    "core": "adapter calls method registry stand_in",
    "structure": "blocks fused_parts inner_models",
    "targets": "select",
    "adapters": "low_rank rows",
    "adapters.bottleneck": "bottleneck residual tap",
    "adapters.virtual_tokens": "infix initial_tokens prefix_cache prefixes prompt virtual_tokens",
    "operations": "combine eject fold inject merge per_sample prepare",
    "storage": "base_weights checkpoint fingerprint parts state",
    "strategy": "bases restore",
    "strategy.optimizers": "optim param_groups schedule",
}
MOVED = {
    **{name: f"{room}.{name}" for room, names in _ROOMS.items() for name in names.split()},
    "bottleneck_rows": "adapters.bottleneck.rows",
    "cli_errors": "parsing.method_errors",
    "commands": "cli.tools.inspect",
    "disable": "core.contexts",
    "formats.files": "files.contents",
    "planning.command": "cli.plan",
    **{f"tasks.{name}": f"tasks.answers.{name}" for name in ("answer_loss", "generation")},
    **{f"tasks.{name}": f"tasks.batches.{name}" for name in ("records", "resumable", "sampling")},
    **{f"tasks.{name}": f"tasks.data.{name}" for name in ("classification_data", "instruction_data")},
}
"""What every module that has moved was called, with its name of today; a package stands for what is in it."""


class _Moved(MetaPathFinder, Loader):
    """Finds a module of release 0.1 where it is today."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if _today(fullname) else None

    def exec_module(self, module: ModuleType) -> None:
        # What stands here when this returns is what `import` gives: one module with two names, not two modules.
        sys.modules[module.__name__] = import_module(f"{_PACKAGE}.{_today(module.__name__)}")


def _today(fullname: str) -> str | None:
    package, _, name = fullname.partition(".")
    if package != _PACKAGE:
        return None
    first, _, rest = name.partition(".")
    return MOVED.get(name) or (f"{MOVED[first]}.{rest}" if rest and first in MOVED else None)


def keep_old_names() -> None:
    """Let modules be imported by the names that they had in release 0.1."""
    if any(isinstance(finder, _Moved) for finder in sys.meta_path):
        return
    # Before Python's own finder, which would find what is in a moved package a second time, by the package's path.
    sys.meta_path.insert(0, _Moved())
    package = sys.modules[_PACKAGE]
    for old, new in MOVED.items():
        module = sys.modules.get(f"{_PACKAGE}.{new}")
        # Importing it later would put the module in the place of the function `merge`, which goes by its name.
        if module is not None:
            sys.modules[f"{_PACKAGE}.{old}"] = module
            if "." not in old and not hasattr(package, old):
                setattr(package, old, module)
