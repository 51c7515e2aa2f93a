"""Which part may import what: everything below the strategy works on any torch module, without Lightning."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "lightning_peft"
# The files and folders that may know Lightning. All others are found by walking the tree.
UPPER = {
    "__init__",
    "__main__",
    "bases",
    "callbacks",
    "cli",
    "commands",
    "planning/command",
    "restore",
    "strategy",
    "tasks",
}
# The judges in tests, and the other distribution of Lightning, whose classes pass no isinstance check of ours.
NEVER = {"peft", "loralib", "adapters", "pytorch_lightning", "lightning_fabric", "callbacks"}

SOURCES = sorted(path for folder in (PACKAGE, ROOT / "callbacks") for path in folder.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


LOWER = [
    path
    for path in SOURCES
    if path.is_relative_to(PACKAGE) and not any(path.with_suffix("").is_relative_to(PACKAGE / upper) for upper in UPPER)
]


def imported(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it: at the top, in a function, or for the type checker."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_no_file_imports_what_the_package_does_without(path: Path) -> None:
    assert not {name for name in imported(path) if name.split(".")[0] in NEVER}


@pytest.mark.parametrize("path", LOWER, ids=module_name)
def test_a_lower_file_imports_nothing_from_above(path: Path) -> None:
    above = {f"lightning_peft.{name}" for name in UPPER}
    names = imported(path)
    assert not {name for name in names if name.split(".")[0] == "lightning"}
    assert not {name for name in names if ".".join(name.split(".")[:2]) in above}


def test_lower_modules_load_without_lightning(tmp_path: Path) -> None:
    """A stand-in takes the place of the package, whose own ``__init__`` imports the strategy and so Lightning."""
    code = """
import importlib, json, sys, types
package = types.ModuleType("lightning_peft")
package.__path__ = [sys.argv[1]]
sys.modules["lightning_peft"] = package
guilty = {}
for name in json.loads(sys.argv[2]):
    importlib.import_module(name)
    for unwanted in json.loads(sys.argv[3]):
        if unwanted in sys.modules:
            guilty.setdefault(unwanted, name)
print(json.dumps(guilty))
"""
    names, unwanted = [module_name(path) for path in LOWER], ["lightning", *sorted(NEVER)]
    arguments = [str(PACKAGE), json.dumps(names), json.dumps(unwanted)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {}
