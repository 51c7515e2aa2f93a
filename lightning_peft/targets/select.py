"""From patterns to modules: what to adapt. A pattern that matches nothing is an error with near names."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import regex
from torch import nn

from lightning_peft.core.adapter import base_modules, clean_name
from lightning_peft.core.weights import is_linear
from lightning_peft.errors import PEFTError

ALL_LINEAR = "all-linear"
PRESETS = (ALL_LINEAR, "attention", "mlp")

# A pattern may come from a stranger's file. Backtracking is exponential in the worst case, hence the limit.
_REGEX_SECONDS = 0.5
_REGEX_LENGTH = 2000

_ATTENTION = regex.compile(r"(^|.*_)(attn|attention|selfattention|encdecattention)$", regex.IGNORECASE)

Names = str | Sequence[str]
T = TypeVar("T")


def select(
    model: nn.Module,
    targets: Names,
    *,
    adaptable: Callable[[nn.Module], bool],
    weights: Callable[[nn.Module], Iterable[str]] | None = None,
    exclude: Names | None = None,
    layers: str | Sequence[int] | None = None,
) -> dict[str, nn.Module]:
    """Return the modules of ``model`` that ``targets`` name, by name, in the model's order.

    Args:
        model: Where to look.
        targets: ``"all-linear"`` (without the output head), ``"attention"``, ``"mlp"``, or patterns (see
            :func:`matches`), mixed at will.
        adaptable: Whether the method can adapt a module. Others are passed over, unless a pattern matches nothing
            else.
        weights: Gives the names of parameters of a module that can be adapted one by one. They are selected by their
            own name, ``experts.down_proj``, and returned by it, with that module.
        exclude: Patterns of modules to leave out.
        layers: Indices of blocks to adapt, or a slice (``"8:16"``, ``"-4:"``). Modules outside blocks go.

    Raises:
        PEFTError: A pattern matches nothing (the nearest names are listed), only modules that cannot be adapted,
            or a layer does not exist.
    """
    modules = named_modules(model)
    candidates = {name: module for name, module in modules.items() if adaptable(module)}
    aliases = _aliases(model, modules)
    uncalled = _uncalled(modules)
    parameters = {
        f"{name}.{weight}".lstrip("."): module
        for name, module in modules.items()
        for weight in (() if weights is None or name in candidates else weights(module))
    }
    modules, candidates = modules | parameters, candidates | parameters
    chosen: set[str] = set()
    for pattern in as_list(targets):
        if pattern in PRESETS:
            found = _preset(model, candidates, modules, pattern) - uncalled
        else:
            found = match_names(pattern, candidates)
            found |= {name for alias, name in aliases.items() if name in candidates and matches(pattern, alias)}
        if not found:
            raise PEFTError(_nothing_matched(pattern, modules, candidates))
        chosen |= found
    for pattern in as_list(exclude or ()):
        found = match_names(pattern, modules)
        if not found:
            raise PEFTError(_nothing_matched(pattern, modules, candidates, what="exclude_modules"))
        chosen -= found
    if layers is not None:
        chosen &= _in_layers(_blocks(model, modules), layers)
    if refused := sorted(chosen & uncalled):
        raise PEFTError(
            f"{refused[0]!r} cannot be adapted: nn.MultiheadAttention reads its weight and never calls it, so an "
            f"adapter would have no effect. Leave it out with exclude_modules={refused!r}; LoRA adapts the "
            "nn.MultiheadAttention itself."
        )
    if not chosen:
        raise PEFTError(
            f"No module is left to adapt: target_modules={targets!r}, exclude_modules={exclude!r}, layers={layers!r} "
            "leave nothing. Drop one of the restrictions."
        )
    return {name: module for name, module in candidates.items() if name in chosen}


def in_layers(model: nn.Module, names: Iterable[str], layers: str | Sequence[int] | None) -> list[str]:
    """Return those of ``names`` that are in the blocks that ``layers`` names, all if that is ``None``.

    Raises:
        PEFTError: There is no such layer.
    """
    wanted = None if layers is None else _in_layers(_blocks(model, named_modules(model)), layers)
    return [name for name in names if wanted is None or name in wanted]


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` names the module ``name``.

    ``"q_proj"`` and ``"self_attn.q_proj"`` match at the end of a name, from a dot on. In such a pattern ``*`` stands
    for any text within one segment and ``**`` for any text. ``"re:…"`` is a regular expression for the whole name.

    Raises:
        PEFTError: The regular expression is malformed, too long, or takes too long.
    """
    if pattern.startswith("re:"):
        return fullmatch(pattern[3:], name)
    if "*" not in pattern:
        return name == pattern or name.endswith(f".{pattern}")
    parts = (regex.escape(text, special_only=True) for text in pattern.replace("**", "\0").split("*"))
    expression = "[^.]*".join(parts).replace("\0", ".*")
    return fullmatch(rf"(?:.*\.)?{expression}", name)


def fullmatch(expression: str, name: str) -> bool:
    """Whether the regular expression matches the whole of ``name``.

    Raises:
        PEFTError: It is malformed, too long, or takes too long.
    """
    if len(expression) > _REGEX_LENGTH:
        raise PEFTError(f"A pattern of {len(expression)} characters was given; {_REGEX_LENGTH} is the limit.")
    try:
        return regex.fullmatch(expression, name, timeout=_REGEX_SECONDS) is not None
    except TimeoutError:
        raise PEFTError(
            f"The regular expression {expression!r} took more than {_REGEX_SECONDS} s on {name!r}. "
            "Write it without nested repetition, or list the modules' names."
        ) from None
    except regex.error as error:
        raise PEFTError(f"The regular expression {expression!r} is malformed: {error}.") from error


def match_names(pattern: str, modules: Mapping[str, object]) -> set[str]:
    """Return the names among ``modules`` that ``pattern`` matches."""
    return {name for name in modules if matches(pattern, name)}


def first_match(patterns: Mapping[str, T], name: str, default: T) -> T:
    """Return the value of ``name`` itself or else of the first pattern that matches it, or ``default``."""
    if name in patterns:
        return patterns[name]
    return next((value for pattern, value in patterns.items() if matches(pattern, name)), default)


def require_matches(patterns: Iterable[str], names: Mapping[str, object], what: str) -> None:
    """Raise :class:`PEFTError` for the first pattern that matches none of ``names``."""
    for pattern in patterns:
        if not match_names(pattern, names):
            raise PEFTError(_nothing_matched(pattern, names, names, what=what))


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return every module by its clean name, but for adapters; a module used in two places has its first name."""
    found: dict[str, nn.Module] = {}
    for name, module in base_modules(model):
        cleaned = clean_name(name)
        # Of a wrapper and what it wraps, which have one clean name, it is the latter that is the user's.
        if cleaned not in found or cleaned != name:
            found[cleaned] = module
    return found


def transformers_models(model: nn.Module) -> dict[str, nn.Module]:
    """Return the outermost transformers models in ``model``, by name; known by what they offer, not by import."""
    found: dict[str, nn.Module] = {}
    lead: str | None = None
    for name, module in named_modules(model).items():
        # What is inside a module follows it.
        if lead is not None and name.startswith(lead):
            continue
        if hasattr(module, "save_pretrained") and hasattr(module, "get_output_embeddings"):
            found[name] = module
            lead = f"{name}." if name else ""
    return found


def as_list(names: Names) -> list[str]:
    """Return one pattern or several as a list."""
    return [names] if isinstance(names, str) else list(names)


def _preset(
    model: nn.Module, candidates: Mapping[str, nn.Module], modules: Mapping[str, nn.Module], preset: str
) -> set[str]:
    heads = head_modules(model)
    linears = {
        name
        for name, m in candidates.items()
        if isinstance(m, nn.MultiheadAttention) or (is_linear(m) and id(m) not in heads)
    }
    if preset == ALL_LINEAR:
        return linears
    in_blocks = linears & _blocks(model, modules).keys()
    attention = {name for name in in_blocks if any(is_attention_name(part) for part in name.split("."))}
    return attention if preset == "attention" else in_blocks - attention


def _aliases(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Map every further name of a module that stands in several places to its first one."""
    first = {id(module): name for name, module in modules.items()}
    every = {clean_name(name): id(module) for name, module in model.named_modules(remove_duplicate=False)}
    return {name: first[key] for name, key in every.items() if name not in modules and key in first}


def _uncalled(modules: Mapping[str, nn.Module]) -> set[str]:
    """Names of modules whose parent reads their weight instead of calling them: no hook of theirs ever runs."""
    return {
        f"{name}.out_proj" if name else "out_proj"
        for name, module in modules.items()
        if isinstance(module, nn.MultiheadAttention)
    }


def is_attention_name(segment: str) -> bool:
    """Whether a segment of a module's name is one that attention blocks have."""
    return _ATTENTION.match(segment) is not None


def head_modules(model: nn.Module) -> set[int]:
    """Ids of the modules of the output heads: what a transformers model has beside its base model."""
    heads: set[int] = set()
    for module in transformers_models(model).values():
        base = getattr(module, "base_model", module)
        if base is not module:
            body = {id(part) for part in base.modules()}
            heads |= {id(part) for part in module.modules()} - body
        output = cast(Any, module).get_output_embeddings()
        heads |= {id(output)} if output is not None else set()
    return heads


def _blocks(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, tuple[str, int]]:
    """Map each module inside a list of repeated blocks to ``(name of the outermost list, index of the block)``."""
    found: dict[str, tuple[str, int]] = {}
    roots = transformers_models(model)
    for name in modules:
        parent, _, leaf = name.rpartition(".")
        if parent in found:
            found[name] = found[parent]
        # A list that holds whole models is no list of blocks.
        elif leaf.isdigit() and name not in roots and isinstance(modules[parent], nn.ModuleList | nn.Sequential):
            found[name] = (parent, int(leaf))
    return found


def _in_layers(blocks: Mapping[str, tuple[str, int]], layers: str | Sequence[int]) -> set[str]:
    if not blocks:
        raise PEFTError(f"layers={layers!r} was given, but the model has no list of blocks. Drop it.")
    counts: dict[str, int] = {}
    for parent, index in blocks.values():
        counts[parent] = max(counts.get(parent, 0), index + 1)
    wanted = {parent: _indices(layers, count) for parent, count in counts.items()}
    if not isinstance(layers, str):
        missing = sorted({index for index in layers if not any(index in chosen for chosen in wanted.values())})
        if missing:
            raise PEFTError(f"layers={list(layers)!r}: there is no layer {missing}. Layers there are: {counts}.")
    if not any(wanted.values()):
        raise PEFTError(f"layers={layers!r} selects no layer. Layers there are: {counts}.")
    return {name for name, (parent, index) in blocks.items() if index in wanted[parent]}


def _indices(layers: str | Sequence[int], count: int) -> set[int]:
    if not isinstance(layers, str):
        return {index for index in layers if 0 <= index < count}
    bounds = layers.split(":")
    try:
        numbers = [int(bound) if bound.strip() else None for bound in bounds]
    except ValueError:
        numbers = []
    if not 2 <= len(numbers) <= 3:
        raise PEFTError(f"layers={layers!r} is no slice. Write a list of indices, or a slice such as '8:16' or '-4:'.")
    return set(range(count)[slice(*numbers)])


def _nothing_matched(
    pattern: str, modules: Mapping[str, object], candidates: Mapping[str, object], what: str = "target_modules"
) -> str:
    others = match_names(pattern, modules) if pattern not in PRESETS else set()
    if others:
        kinds = sorted({type(modules[name]).__name__ for name in others})
        inside = [name for name in candidates if any(name.startswith(f"{other}.") for other in others)]
        hint = f" Name the modules inside: {', '.join(inside[:5])}." if inside else ""
        return f"{what}: {pattern!r} matches only modules that cannot be adapted ({', '.join(kinds)}).{hint}"
    leaves = {name.rsplit(".", 1)[-1] for name in candidates}
    near = difflib.get_close_matches(pattern.removeprefix("re:"), sorted(leaves | set(candidates)), n=5, cutoff=0.5)
    near = near or sorted(leaves)[:10]
    return f"{what}: {pattern!r} matches no module. Nearest names: {', '.join(near) or 'none'}."
