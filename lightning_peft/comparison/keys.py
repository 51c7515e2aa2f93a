"""The keys of a run's config: short names for the usual ones, and how a value is put in its place."""

from __future__ import annotations

import copy
import inspect
import pkgutil
from collections.abc import Mapping
from typing import Any

from lightning_peft.core.method import registered_methods
from lightning_peft.errors import PEFTError, near

STRATEGY = "trainer.strategy"
METHOD = f"{STRATEGY}.method"
SEED = "seed"
SHORT = {
    "method": METHOD,
    "rank": f"{METHOD}.r",
    "targets": f"{METHOD}.target_modules",
    "placement": f"{METHOD}.placement",
    "bottleneck": f"{METHOD}.bottleneck",
    "lr": "model.lr",
    "data_size": "data.train_examples",
    SEED: "seed_everything",
}
"""Short names, and the keys that they stand for. ``method.X`` is any other hyper-parameter of the method."""
SECTIONS = ("seed_everything", "trainer", "model", "data", "optimizer", "lr_scheduler")
"""What a run's config has at its top."""
_OWN = ("class_path", "init_args", "dict_kwargs")


def check_key(key: Any, where: str) -> None:
    """Check that a key may be one of a run's config; what is below its first part, the config itself knows.

    Raises:
        PEFTError: It is neither a short name nor in a section of a config.
    """
    first = key.partition(".")[0] if isinstance(key, str) else ""
    if key not in SHORT and first not in (*SECTIONS, "method"):
        hint = near(first or str(key), [*SHORT, *SECTIONS])
        raise PEFTError(
            f"{where}: there is no key {key!r}. {hint}Write a short name ({', '.join(SHORT)}, method.X) or a dotted "
            f"path that begins with one of {', '.join(SECTIONS)}."
        )


def put(config: dict[str, Any], key: str, value: Any) -> None:
    """Set a key in a config that was read from YAML. What it replaces is replaced as a whole.

    Args:
        config: The config, which is changed.
        key: A short name or a dotted path, in which ``init_args`` may be left out.
        value: What stands there from now on.

    Raises:
        PEFTError: On the way is something in which there are no keys.
    """
    if key == "method":
        value = _method(value)
    full = f"{METHOD}.{key.removeprefix('method.')}" if key.startswith("method.") else SHORT.get(key, key)
    *parents, last = full.split(".")
    node: Any = config
    for number, part in enumerate(parents):
        node = _child(_inside(node, part, full), part, ".".join(parents[: number + 1]), key)
    node = _inside(node, last, full)
    node[int(last) if isinstance(node, list) else last] = copy.deepcopy(value)
    if key == SEED and _takes_seed(config.get("data")):
        put(config, "data.seed", value)


def _inside(node: Any, part: str, full: str) -> Any:
    """Return where in ``node`` the key ``part`` stands: of a class, among its arguments."""
    if isinstance(node, list) and not (part.isdigit() and int(part) < len(node)):
        raise PEFTError(
            f"{full}: there is a list of {len(node)} at {part!r}. Number its entry, or give its whole value."
        )
    if isinstance(node, dict) and "class_path" in node and part not in _OWN:
        if not isinstance(node.get("init_args"), dict):
            node["init_args"] = {}
        return node["init_args"]
    return node


def _child(node: Any, part: str, path: str, key: str) -> Any:
    place: Any = int(part) if isinstance(node, list) else part
    found = node[place] if isinstance(node, list) else node.get(place)
    if found is None:
        found = {"class_path": "lightning_peft.PEFTStrategy"} if path == STRATEGY else {}
        if path == METHOD:
            found = _method("LoRA")
    elif isinstance(found, str):
        if path == STRATEGY:
            raise PEFTError(
                f"{key}: the config's strategy is the name {found!r}, which has no keys. Write it as a class: "
                "strategy: {class_path: lightning_peft.PEFTStrategy, init_args: {method: …}}."
            )
        found = _method(found) if path == METHOD else {"class_path": found}
    elif not isinstance(found, dict | list):
        raise PEFTError(f"{key}: {path} is {found!r} in the config, which has no keys.")
    node[place] = found
    return found


def _method(value: Any) -> Any:
    """Return a method as a config has it: of a class's name, of its registered name, or of several methods."""
    if isinstance(value, list):
        return [_method(entry) for entry in value]
    if isinstance(value, Mapping):
        path = value.get("class_path")
        return {**value, "class_path": _method(path)["class_path"]} if isinstance(path, str) else dict(value)
    methods = registered_methods()
    names = {cls.__name__: cls.__name__ for cls in methods.values()} | {n: c.__name__ for n, c in methods.items()}
    if not isinstance(value, str) or ("." not in value and value not in names):
        known = sorted({cls.__name__ for cls in methods.values()})
        raise PEFTError(f"There is no method {value!r}. {near(str(value), known)}Methods: {', '.join(known)}.")
    return {"class_path": value if "." in value else f"lightning_peft.{names[value]}"}


def _takes_seed(data: Any) -> bool:
    """Whether a config's data draw from a seed of their own, such as that of their order."""
    path = data.get("class_path") if isinstance(data, dict) else data
    if not isinstance(path, str):
        return False
    try:
        cls = pkgutil.resolve_name(path if "." in path else f"lightning_peft.tasks.{path}")
    except (ImportError, AttributeError, ValueError):
        return False  # the parser says it better
    return "seed" in inspect.signature(cls).parameters
