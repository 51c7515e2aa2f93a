"""``pytorch_lightning``: the code of ``lightning`` in a distribution of its own, with classes of its own.

What belongs to it is refused in words where it is given. A program that needs a package which imports it may have that
package given ``lightning`` instead.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from lightning_peft.errors import PEFTError

OTHER = "pytorch_lightning"
_SAME = {OTHER: "lightning.pytorch", "lightning_fabric": "lightning.fabric"}


def refuse_other_lightning(given: object, what: str) -> None:
    """Check that ``given`` is not of ``pytorch_lightning``.

    Args:
        given: An object, or a class.
        what: What to call it in the message.

    Raises:
        PEFTError: It is.
    """
    kind = given if isinstance(given, type) else type(given)
    if any(base.__module__.partition(".")[0] == OTHER for base in kind.__mro__):
        raise PEFTError(
            f"{what} is of {OTHER}. That is the code of lightning in another distribution, with other classes; "
            "lightning_peft works with those of lightning. Write `import lightning.pytorch as pl` instead of "
            f"`import {OTHER} as pl`. If it is a package that imports {OTHER}, call "
            "lightning_peft.replace_pytorch_lightning() before that package is imported."
        )


def let_in(strategy: type) -> None:
    """Have Trainers of ``pytorch_lightning`` take ``strategy`` for one of theirs, so that they come to refuse it here.

    They would call it an invalid strategy name.
    """
    if strategies := sys.modules.get(f"{OTHER}.strategies"):
        strategies.Strategy.register(strategy)


def other_registries() -> list[Any]:
    """Return the registry of strategies of ``pytorch_lightning``, if that was imported."""
    strategies = sys.modules.get(f"{OTHER}.strategies")
    return [] if strategies is None else [strategies.StrategyRegistry]


def replace_pytorch_lightning() -> None:
    """Have everything that imports ``pytorch_lightning`` from now on, or a part of it, be given that of ``lightning``.

    So packages that import it, and make Trainers of it, work with ``PEFTStrategy``.

    Raises:
        PEFTError: It was imported already.
    """
    if any(isinstance(finder, _Replacement) for finder in sys.meta_path):
        return
    if present := sorted(_SAME.keys() & sys.modules.keys()):
        raise PEFTError(
            f"{present[0]} was imported before replace_pytorch_lightning() was called: there are classes of it by now. "
            "Call it first of all, at the top of the program."
        )
    sys.meta_path.insert(0, _Replacement())


class _Replacement(MetaPathFinder, Loader):
    """Finds, for each module of the one distribution, that of the other."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname.partition(".")[0] in _SAME else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        top, dot, rest = spec.name.partition(".")
        module = importlib.import_module(f"{_SAME[top]}{dot}{rest}")
        # Python gives the module the new name's, which is not to be seen in it.
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state
