"""The file of a comparison: a config, axes, what is chosen by validation and what is reported."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_peft.comparison.keys import SEED, check_key
from lightning_peft.errors import PEFTError, listed, near

STAGES = ("validate", "test")
_KEYS = ("config", "out", "set", "axes", "choose", "report", "keep_adapters", "slurm")
_CHOICE = ("axis", "metric", "mode", "seeds")


@dataclass(frozen=True)
class Choice:
    """What is chosen for each cell on validation data, before cells are compared."""

    axis: str
    metric: str
    mode: str
    """``"min"`` or ``"max"``."""
    seeds: tuple[str, ...]
    """Labels of the seeds whose mean decides; empty if there is no axis of seeds."""


@dataclass(frozen=True, eq=False)
class Grid:
    """A comparison, as its file says."""

    source: Path
    config: Mapping[str, Any]
    """The LightningCLI config that all runs have in common."""
    out: Path
    settings: Mapping[str, Any]
    axes: Mapping[str, Mapping[str, Mapping[str, Any]]]
    """By axis, its values by label, each as keys of the config with their values."""
    choice: Choice | None
    report: Mapping[str, tuple[str, ...]]
    """By stage, the names of the metrics of the table."""
    keep_adapters: bool
    slurm: Mapping[str, Any]

    @property
    def compared(self) -> tuple[str, ...]:
        """The axes whose combinations are cells: without seeds, and without what is chosen."""
        return tuple(name for name in self.axes if name != SEED and (not self.choice or name != self.choice.axis))


def read_grid(path: str | Path, out: str | None = None) -> Grid:
    """Read the file of a comparison.

    Args:
        path: The YAML file.
        out: Where results go instead of where the file says.

    Raises:
        PEFTError: It cannot be read, or something in it is not as it should be; the message says what.
    """
    source = Path(path)
    content = read_yaml(source)
    _known(content, _KEYS, f"{source}")
    configs: Any = content.get("config")
    files: list[Any] = configs if isinstance(configs, list) else [configs]
    if not files or not all(isinstance(file, str) for file in files):
        raise PEFTError(f"{source}: config is {configs!r}; it is the path of a LightningCLI config, or a list of them.")
    config: dict[str, Any] = {}
    for file in files:
        config = _over(config, read_yaml(source.parent / file))
    place = out or content.get("out")
    if not isinstance(place, str):
        raise PEFTError(f"{source}: out is {place!r}; it is the directory of the results.")
    axes = {name: _axis(name, values, source) for name, values in _mapping(content, "axes", source).items()}
    if not axes:
        raise PEFTError(f"{source}: there are no axes, so there is nothing to compare. Write them under axes.")
    settings = _mapping(content, "set", source)
    for key in settings:
        check_key(key, f"{source}, set")
    choice = _choice(content.get("choose"), axes, source)
    keep = content.get("keep_adapters", True)
    if not isinstance(keep, bool):
        raise PEFTError(f"{source}: keep_adapters is {keep!r}; it is true or false.")
    report, slurm = _report(content, source), _mapping(content, "slurm", source)
    return Grid(source, config, Path(place), settings, axes, choice, report, keep, slurm)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file whose content is a mapping, in which no key is there twice.

    Raises:
        PEFTError: It is another file, or there is none.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise PEFTError(f"{path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PEFTError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise PEFTError(f"{path} holds {type(content).__name__}; a mapping of names was expected.")
    return content


def label(value: Any) -> str:
    """Return a value as the table shows it."""
    if isinstance(value, str):
        return value
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10_000)
    return text.removesuffix("...\n").strip()


class _Loader(yaml.SafeLoader):
    """Refuses keys that are there twice, of which the last would hold, and reads 1e-3 as a number."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is there twice", node.start_mark)
        content: dict[Any, Any] = super().construct_mapping(node, deep)
        return content


_Loader.add_implicit_resolver(  # type: ignore[no-untyped-call]
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _known(content: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in content:
        if key not in known:
            raise PEFTError(f"{where}: there is no key {key!r}. {near(str(key), known)}Keys: {', '.join(known)}.")


def _mapping(content: Mapping[str, Any], key: str, source: Path) -> dict[str, Any]:
    found = content.get(key) or {}
    if not isinstance(found, dict):
        raise PEFTError(f"{source}: {key} is {found!r}; it is a mapping.")
    return found


def _axis(name: str, values: Any, source: Path) -> dict[str, dict[str, Any]]:
    where = f"{source}, axis {name}"
    if isinstance(values, list):
        check_key(name, where)
        labels = [label(value) for value in values]
        if twice := [one for one in labels if labels.count(one) > 1]:
            raise PEFTError(f"{where} has {twice[0]} twice: two cells would have one name.")
        found = {one: {name: value} for one, value in zip(labels, values, strict=True)}
    elif isinstance(values, dict) and all(isinstance(bundle, dict) for bundle in values.values()):
        found = {label(one): bundle for one, bundle in values.items()}
        for one, bundle in found.items():
            for key in bundle:
                check_key(key, f"{where}, {one}")
    else:
        raise PEFTError(f"{where} is {values!r}; it is a list of values, or a mapping of names to {{key: value, …}}.")
    if len(found) < 2:
        raise PEFTError(
            f"{where} has {len(found)} value{'' if len(found) == 1 else 's'}: there is nothing to compare along it. "
            "What all cells have belongs under set, or into the config."
        )
    return found


def _choice(given: Any, axes: Mapping[str, Mapping[str, Any]], source: Path) -> Choice | None:
    if given is None:
        return None
    where = f"{source}, choose"
    if not isinstance(given, dict):
        raise PEFTError(f"{where} is {given!r}; it is a mapping of {', '.join(_CHOICE)}.")
    _known(given, _CHOICE, where)
    axis, metric, mode = (given.get(key) for key in ("axis", "metric", "mode"))
    if not isinstance(axis, str) or axis not in axes or axis == SEED:
        others = [name for name in axes if name != SEED]
        raise PEFTError(f"{where}: axis is {axis!r}. {near(str(axis), others)}It is one of {', '.join(others)}.")
    if not isinstance(metric, str) or not isinstance(mode, str) or mode not in ("min", "max"):
        raise PEFTError(
            f"{where}: metric is {metric!r} and mode {mode!r}. Name a metric that validation logs, and min or max."
        )
    known = list(axes.get(SEED, ()))
    seeds = given.get("seeds", known[:1])
    chosen = [label(seed) for seed in seeds] if isinstance(seeds, list) else [label(seeds)]
    if unknown := [seed for seed in chosen if seed not in known]:
        raise PEFTError(f"{where}: there is no seed {listed(unknown)}. The axis seed has {listed(known) or 'none'}.")
    return Choice(axis, metric, mode, tuple(chosen))


def _report(content: Mapping[str, Any], source: Path) -> dict[str, tuple[str, ...]]:
    given = _mapping(content, "report", source)
    where = f"{source}, report"
    _known(given, STAGES, where)
    report = {}
    for stage, names in given.items():
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise PEFTError(f"{where}: {stage} is {names!r}; it is a list of names of metrics.")
        report[stage] = tuple(dict.fromkeys(names))
    if not report:
        raise PEFTError(f"{where}: no metric is named. Write report: {{test: [test_loss]}}, or validate: [val_loss].")
    return report


def _over(below: Any, above: Any) -> Any:
    """Return a config with another over it: mappings are joined, unless they are of two classes."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return copy.deepcopy(above)
    if "class_path" in above and above["class_path"] != below.get("class_path"):
        return copy.deepcopy(above)
    return {**below, **{key: _over(below.get(key), value) for key, value in above.items()}}
