"""The cells of a grid and their runs: which config each has, and where it runs."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from lightning_peft.comparison.grid import Grid, label
from lightning_peft.comparison.keys import SEED, STRATEGY, put
from lightning_peft.errors import PEFTError

RUNS = "runs"
"""Under it, in the directory of results, each run has a directory of its own."""
CHECKPOINTS = "checkpoints"
_FORMAT = 2
"""Rises when the same config would be measured otherwise."""
_SAVER = "lightning_peft.callbacks.AdapterCheckpoint"


@dataclass(frozen=True, eq=False)
class Cell:
    """A combination of values, without the seed and without what is chosen."""

    name: str
    labels: Mapping[str, str]
    """By axis, the label of its value."""
    candidates: Mapping[str, Any]
    """By label, the values among which one is chosen; one or none if nothing is to be chosen."""


@dataclass(frozen=True, eq=False)
class Run:
    """A training run of a cell."""

    cell: Cell
    candidate: str | None
    seed: str | None
    config: Mapping[str, Any]
    out: Path
    name: str
    """The cell's name, with the candidate and the seed."""

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the config: what another config has computed is never taken for this run's."""
        text = json.dumps([_FORMAT, self.config], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @cached_property
    def directory(self) -> Path:
        """Where it runs, and where its result is."""
        readable = re.sub(r"[^\w.=+-]+", "_", self.name).strip("_")[:80]
        return self.out / RUNS / f"{readable}-{self.fingerprint}"


def cells(grid: Grid) -> list[Cell]:
    """Return the cells of a grid, in the order of its axes.

    Raises:
        PEFTError: Two of them have one name, or one config.
    """
    found = []
    for labels in itertools.product(*(grid.axes[name] for name in grid.compared)):
        chosen = dict(zip(grid.compared, labels, strict=True))
        shown = [_shown(grid, axis, one) for axis, one in chosen.items()]
        found.append(Cell(", ".join(shown) or "all", chosen, _candidates(grid, chosen)))
    names = [cell.name for cell in found]
    for name in names:
        if names.count(name) > 1:
            raise PEFTError(f"{grid.source}: two cells have the name {name!r}. Give their values other names.")
    seen: dict[str, Cell] = {}
    for cell in found:
        key = json.dumps([config_of(grid, cell, None, None), cell.candidates], sort_keys=True, default=str)
        if (other := seen.setdefault(key, cell)) is not cell:
            raise PEFTError(
                f"{grid.source}: the cells {other.name!r} and {cell.name!r} have the same config. An axis has no "
                "effect, perhaps because a later one sets its keys anew."
            )
    return found


@cache
def run_of(grid: Grid, cell: Cell, candidate: str | None, seed: str | None) -> Run:
    """Return a run of a cell; its paths are those of the machine, so that it may start anywhere."""
    given = {grid.choice.axis if grid.choice else "": candidate, SEED: seed}
    name = ", ".join([cell.name, *(f"{key}={value}" for key, value in given.items() if value is not None)])
    return Run(cell, candidate, seed, config_of(grid, cell, candidate, seed), grid.out.absolute(), name)


def config_of(grid: Grid, cell: Cell, candidate: str | None, seed: str | None) -> dict[str, Any]:
    """Return the config of a cell.

    Raises:
        PEFTError: A key has no place in it.
    """
    config = copy.deepcopy(dict(grid.config))
    axis = grid.choice.axis if grid.choice else None
    bundles = [grid.settings]
    for name, values in grid.axes.items():
        if name == axis:
            bundles.append(cell.candidates.get(candidate, {}) if candidate is not None else {})
        elif name == SEED:
            bundles.append(values[seed] if seed is not None else {})
        else:
            bundle = values[cell.labels[name]]
            bundles.append({key: value for key, value in bundle.items() if key != axis})
    try:
        for key, value in itertools.chain.from_iterable(bundle.items() for bundle in bundles):
            put(config, key, value)
    except PEFTError as error:
        raise PEFTError(f"{grid.source}, cell {cell.name!r}: {error}") from error
    return config


def placed(run: Run) -> dict[str, Any]:
    """Return a run's config as it is run: everything that it writes lies in its directory, from which it resumes.

    Adapters stay unmerged when training has ended: what merging does is measured afterwards.

    Raises:
        PEFTError: The strategy is none of this package's.
    """
    config = copy.deepcopy(dict(run.config))
    strategy = (config.get("trainer") or {}).get("strategy")
    path = strategy.get("class_path") if isinstance(strategy, dict) else strategy
    if strategy is not None and not str(path).endswith("PEFTStrategy"):
        raise PEFTError(
            f"Cell {run.cell.name!r}: its strategy is {path!r}; lightning_peft.PEFTStrategy was expected. Its method "
            "FullFinetuning trains without adapters."
        )
    put(config, f"{STRATEGY}.merge_on_train_end", False)
    trainer = config["trainer"]
    trainer |= {"default_root_dir": str(run.directory), "enable_progress_bar": False}
    callbacks = trainer.get("callbacks") or []
    trainer["callbacks"] = callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    savers = [one for one in callbacks if str(_path(one)).rpartition(".")[2] == "AdapterCheckpoint"]
    if not savers:
        callbacks.append({"class_path": _SAVER})
    for number, one in enumerate(callbacks):
        if str(_path(one)).rpartition(".")[2] == "AdapterCheckpoint":
            put(config, f"trainer.callbacks.{number}.dirpath", str(run.directory / CHECKPOINTS))
            put(config, f"trainer.callbacks.{number}.save_last", True)
        elif isinstance(one, dict) and "dirpath" in (one.get("init_args") or {}):
            put(config, f"trainer.callbacks.{number}.dirpath", str(run.directory / "files"))
    loggers = trainer.get("logger")
    for one in loggers if isinstance(loggers, list) else [loggers]:
        if isinstance(one, dict) and "save_dir" in (one.get("init_args") or {}):
            one["init_args"]["save_dir"] = str(run.directory)
    return config


def _path(callback: Any) -> Any:
    return callback.get("class_path") if isinstance(callback, dict) else callback


def _shown(grid: Grid, axis: str, one: str) -> str:
    """Return how a name of a cell shows a value: with its axis, unless it has a name of its own."""
    is_bundle = set(grid.axes[axis][one]) != {axis} or label(grid.axes[axis][one][axis]) != one
    return one if is_bundle or axis == "method" else f"{axis}={one}"


def _candidates(grid: Grid, labels: Mapping[str, str]) -> dict[str, Any]:
    """Return the values to choose from, by label, each as keys of the config; a bundle may have its own."""
    if grid.choice is None:
        return {}
    axis = grid.choice.axis
    found = grid.axes[axis]
    for name, one in labels.items():
        if axis in grid.axes[name][one]:
            own = grid.axes[name][one][axis]
            found = {label(value): {axis: value} for value in (own if isinstance(own, list) else [own])}
    return dict(found)
