"""Commands of the pages: what can be told of one without running it."""

import ast
import functools
import importlib.util
import re
import shlex
import subprocess
from collections.abc import Callable
from importlib.metadata import metadata

import yaml
from pages import ROOT
from read_config import CONFIGS, Read

from lightning_peft.cli import COMMANDS, RUNS

QUICKSTART = CONFIGS / "quickstart.yaml"


def words(command: str) -> list[str]:
    """Return the words of a command without the variables that stand before it."""
    found = shlex.split(command)
    while re.fullmatch(r"[A-Z_]+=.*", found[0]):
        found.pop(0)
    return found


def is_command(code: str) -> bool:
    """Whether code within a sentence is one, and not only the name of a program."""
    return " " in code and code[0] not in "<'\"" and words(code)[0] in CHECKS


@functools.cache  # pages share commands
def check(command: str) -> None:
    """Fail if a command names what is not there, or is none that is known here."""
    tool, *arguments = words(command)
    for word in arguments:
        path = word.partition("=")[2] or word
        if path.startswith(("examples/", "tests/")):
            assert (ROOT / path).exists(), path
    CHECKS[tool](arguments)


def _make(arguments: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert arguments[0] in targets


def _pip(arguments: list[str]) -> None:
    """``tests/project/test_packaging.py`` installs the wheel that it builds."""
    action, what = arguments
    extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", what)
    assert action == "install"
    assert extras
    known = metadata("lightning_peft").get_all("Provides-Extra") or []
    assert set(filter(None, (extras[1] or "").split(","))) <= set(known)


def _ours(arguments: list[str]) -> None:
    command, *options = arguments
    assert command in {*RUNS, *COMMANDS, "plan", "compare", "COMMAND", "--version", "--help"}
    if options and "--help" not in options:
        Read([str(QUICKSTART) if word == "run.yaml" else word for word in arguments])


def _python(arguments: list[str]) -> None:
    if arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1])
    else:
        ast.parse((ROOT / arguments[0]).read_text())


def _shell(arguments: list[str]) -> None:
    for script in (word for word in arguments if word.endswith((".sh", ".sbatch"))):
        subprocess.run(["bash", "-n", ROOT / script], check=True)


def _cluster(arguments: list[str]) -> None:
    files = [word for word in arguments if word.endswith(".yaml")]
    assert files
    for file in files:
        assert yaml.safe_load((ROOT / file).read_text())


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "make": _make,
    "pip": _pip,
    "lightning-peft": _ours,
    "python": _python,
    ".venv/bin/python": _python,
    "source": lambda arguments: None,
    "sbatch": _shell,
    "examples/launch/torchrun.sh": lambda arguments: _shell(["examples/launch/torchrun.sh"]),
    "kubectl": _cluster,
    "sky": _cluster,
    "docker": lambda arguments: None,
}
