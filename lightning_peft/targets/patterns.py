"""What a pattern matches, and what to say if that is nothing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from time import thread_time
from typing import TypeVar

import regex
from torch import nn

from lightning_peft.errors import PEFTError

ALL_LINEAR = "all-linear"
PRESETS = (ALL_LINEAR, "attention", "mlp")

# A pattern may come from a stranger's file. Backtracking is exponential in the worst case, hence the limit.
_REGEX_SECONDS = 0.5
_REGEX_LENGTH = 2000
_FILE_SECONDS = 1.0

_spent: ContextVar[list[float] | None] = ContextVar("spent", default=None)

Names = str | Sequence[str]
T = TypeVar("T")


@contextmanager
def patterns_of_a_file() -> Iterator[None]:
    """Within it, all regular expressions together may take a second: they are one file's."""
    token = _spent.set([0.0])
    try:
        yield
    finally:
        _spent.reset(token)


def as_list(names: Names) -> list[str]:
    """Return one pattern or several as a list."""
    return [names] if isinstance(names, str) else list(names)


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
    spent, began = _spent.get(), thread_time()
    try:
        found = regex.fullmatch(expression, name, timeout=_REGEX_SECONDS) is not None
        if spent is not None:
            spent[0] += thread_time() - began
            if spent[0] > _FILE_SECONDS:
                raise PEFTError(
                    f"The file's patterns took more than {_FILE_SECONDS} s, the last of them {expression!r}. Write "
                    "fewer and simpler ones, or list the modules' names."
                )
        return found
    except TimeoutError:
        raise PEFTError(
            f"The regular expression {expression!r} took more than {_REGEX_SECONDS} s on {name!r}. "
            "Write it without nested repetition, or list the modules' names."
        ) from None
    except regex.error as error:
        raise PEFTError(f"The regular expression {expression!r} is malformed: {error}.") from error


def endings(name: str) -> Iterator[str]:
    """Yield ``name``, and what of it begins behind a dot."""
    yield name
    while name := name.partition(".")[2]:
        yield name


class Matcher:
    """Finds what patterns match among ``names``: of plain endings there may be as many as there are names."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = list(names)
        self._by_ending: dict[str, set[str]] | None = None

    def __call__(self, pattern: str) -> set[str]:
        """Return the names that ``pattern`` matches, as :func:`matches` has it."""
        if pattern.startswith("re:") or "*" in pattern:
            return {name for name in self._names if matches(pattern, name)}
        if self._by_ending is None:
            self._by_ending = {}
            for name in self._names:
                for ending in endings(name):
                    self._by_ending.setdefault(ending, set()).add(name)
        return set(self._by_ending.get(pattern, ()))


def match_names(pattern: str, modules: Iterable[str]) -> set[str]:
    """Return the names among ``modules`` that ``pattern`` matches."""
    return {name for name in modules if matches(pattern, name)}


def patterns_for(names: Iterable[str], among: Iterable[str]) -> list[str]:
    """Return patterns that match ``names``: their ends, where these match nothing else ``among`` others."""
    wanted, rest = list(names), set(among)
    ends: dict[str, list[str]] = {}
    for name in wanted:
        parts = name.split(".")
        start = max((i for i, part in enumerate(parts) if not part.isdigit()), default=0)
        ends.setdefault(".".join("*" if part.isdigit() else part for part in parts[start:]), []).append(name)
    rest -= {*wanted}
    short = {end: not match_names(end, dict.fromkeys(rest)) for end in ends}
    return [pattern for end, found in ends.items() for pattern in ([end] if short[end] else found)]


def found_by_preset(targets: Names, name: str) -> bool:
    """Whether a preset among ``targets`` finds what is called ``name``, and no pattern names it."""
    presets = [target for target in as_list(targets) if target in PRESETS]
    return bool(presets) and not any(matches(target, name) for target in as_list(targets) if target not in PRESETS)


def first_match(patterns: Mapping[str, T], name: str, default: T) -> T:
    """Return the value of ``name`` itself or else of the first pattern that matches it, or ``default``."""
    if name in patterns:
        return patterns[name]
    return next((value for pattern, value in patterns.items() if matches(pattern, name)), default)


def require_matches(patterns: Iterable[str], names: Mapping[str, object], what: str) -> None:
    """Raise :class:`PEFTError` for the first pattern that matches none of ``names``."""
    matching = Matcher(names)
    for pattern in patterns:
        if not matching(pattern):
            raise PEFTError(nothing_matched(pattern, names, names, what=what))


def nothing_matched(
    pattern: str, modules: Mapping[str, object], candidates: Mapping[str, object], what: str = "target_modules"
) -> str:
    """Return the message for a pattern that matches nothing, or only what cannot be adapted.

    Args:
        pattern: The pattern.
        modules: What there is, by name.
        candidates: What can be adapted of it.
        what: The option that held the pattern.
    """
    others = match_names(pattern, modules) if pattern not in PRESETS else set()
    if others:
        kinds = sorted({type(modules[name]).__name__ for name in others})
        inside = [name for name in candidates if any(name.startswith(f"{other}.") for other in others)]
        hint = f" Name the modules inside: {', '.join(inside[:5])}." if inside else ""
        if any(isinstance(modules[name], nn.Conv1d | nn.Conv2d | nn.Conv3d) for name in others):
            hint += " LoRA adapts convolutions; LoHa and LoKr those in one and two dimensions, IA3 in two and three."
        return f"{what}: {pattern!r} matches only modules that cannot be adapted ({', '.join(kinds)}).{hint}"
    leaves = {name.rsplit(".", 1)[-1] for name in candidates} - {""}
    presets = difflib.get_close_matches(pattern.lower(), PRESETS, n=1, cutoff=0.8)
    close = difflib.get_close_matches(pattern.removeprefix("re:"), sorted(leaves | set(candidates)), n=5, cutoff=0.5)
    near = [*presets, *close]
    near = near or sorted(leaves)[:10]
    return f"{what}: {pattern!r} matches no module. Nearest names: {', '.join(near) or 'none'}."
