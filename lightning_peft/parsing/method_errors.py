"""What is wrong with a method, the strategy or another class, on the command line or in a config, in one line.

Where a value may be of several types, as a method may, jsonargparse reports for every type why it is not of that one.
"""

from __future__ import annotations

import inspect
import pkgutil
import re
from collections.abc import Iterable, Iterator
from itertools import takewhile
from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from lightning_peft.core.method import registered_methods
from lightning_peft.errors import near

_PROBLEM = re.compile(r"( *)- Problem with given class_path '([\w.]+)':")
_STRATEGY = re.compile(r"lightning_peft\.(?:\w+\.)*PEFTStrategy")
_KEY = re.compile(r'Parser key "(\w+)":')
_EXPECTED = re.compile(r"Expected an? (.+?)(?:\. Got value: (.*))?$", re.MULTILINE)

_ANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

_error = LightningArgumentParser.error


def _error_of_one_line(parser: LightningArgumentParser, message: str, ex: Exception | None = None) -> NoReturn:
    """Say what is wrong with a method without the usage of the whole command; else as Lightning's parser does."""
    if (said := method_error(message)) is not None:
        parser.exit(2, f"error: {said}\n")
    _error(parser, message, ex)


def install() -> None:
    """Have every LightningCLI in this program say in one line what is wrong with a method or the strategy.

    A user's own LightningCLI makes its own parser, and no public place tells it of types that explain themselves.
    """
    LightningArgumentParser.error = _error_of_one_line  # type: ignore[method-assign, assignment]


def method_error(message: str) -> str | None:
    """Return what is wrong with a method or the strategy, if that is what jsonargparse's ``message`` is about."""
    classes = {cls.__name__: cls for cls in registered_methods().values()}
    if unknown := re.search(r"Expected a dot import path string: (\w+)$", message, re.MULTILINE):
        return _no_method(unknown[1], classes) if 'Parser key "method"' in message else None
    # Written by the parser of what the method is an argument of, which the message here is about.
    written = ("There is no method ", *(f"{name}{after}" for name in classes for after in (": ", " has no ")))
    for path, problem in _problems(message):
        name = path.rpartition(".")[2]
        if problem.startswith(written):
            return problem
        if re.match(r"module 'lightning_peft(\.methods[\w.]*)?' has no attribute", problem):
            return _no_method(name, classes)
        if name in classes and (said := _option_error(name, classes[name], problem)):
            return said
    # Of the strategy itself, where nothing is wrong with the method in it.
    for path, problem in _problems(message):
        if _STRATEGY.fullmatch(path) and not _PROBLEM.search(problem):
            return _option_error("PEFTStrategy", pkgutil.resolve_name("lightning_peft.PEFTStrategy"), problem)
    return None


def class_error(message: str) -> str | None:
    """Return what is wrong with a class or its options, if that is what jsonargparse's ``message`` is about.

    The innermost class is meant: what is around it is refused because of it.
    """
    for path, problem in reversed(list(_problems(message))):
        module, _, name = path.rpartition(".")
        if re.match(r"module '[\w.]+' has no attribute", problem):
            names = [key for key, value in vars(pkgutil.resolve_name(module)).items() if isinstance(value, type)]
            return f"{module} has no class {name!r}. {near(name, names)}".strip()
        try:
            cls = pkgutil.resolve_name(path)
        except (ImportError, AttributeError, ValueError):
            continue
        if isinstance(cls, type) and (said := _option_error(cls.__name__, cls, problem)):
            return said
    return None


def _option_error(name: str, cls: type, problem: str) -> str | None:
    """Return what is wrong with an option of the class ``cls``, or with its value."""
    if option := re.match(r"(?:Option|Key) '(\w+)' is not (?:accepted|expected)", problem):
        parameters = inspect.signature(cls).parameters.values()
        options = [parameter.name for parameter in parameters if parameter.kind not in _ANY]
        if not options:
            return None
        hint = near(option[1], options)
        # What a class hands on by **kwargs is not in its signature.
        if len(options) == len(parameters):
            hint += f"It has {', '.join(options)}."
        return f"{name} has no {option[1]!r}. {hint}".strip()
    if missing := re.match(r"the following arguments are required: (.+)", problem):
        return f"{name} needs {missing[1]}."
    if key := _KEY.match(problem):
        return f"{name}: {key[1]}={_given(problem)} was given; {_expected(problem)} was expected."
    return None


def _problems(message: str) -> Iterator[tuple[str, str]]:
    """Yield each class with what follows about it, which is indented more."""
    lines = message.splitlines()
    for number, line in enumerate(lines):
        if found := _PROBLEM.match(line):
            inside = takewhile(re.compile(f"{found[1]} ").match, lines[number + 1 :])
            yield found[2], "\n".join(inside).strip()


def _given(problem: str) -> str:
    values = re.findall(r"^ *Given value: (.*)$", problem, re.MULTILINE)
    return str(values[-1] if values else next(value for _, value in _EXPECTED.findall(problem) if value))


def _expected(problem: str) -> str:
    kinds = []
    for kind, _ in _EXPECTED.findall(problem):
        if literal := re.fullmatch(r"typing\.Literal\[(.*)\]", kind):
            kinds.append(f"one of {literal[1]}")
        else:
            kinds.append(re.sub(r"<class '([\w.]+)'>", r"\1", kind))
    return " or ".join(dict.fromkeys(kind for kind in kinds if kind != "NoneType"))


def _no_method(name: str, classes: Iterable[str]) -> str:
    return f"There is no method {name!r}. {near(name, classes)}Methods: {', '.join(sorted(classes))}."
