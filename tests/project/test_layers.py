"""Which package may import what. Imports go one way; everything below the strategy works without Lightning."""

import ast
import json
import subprocess
import sys
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "lightning_peft"
# What each package imports of this one: neither more nor less. All may import `errors`, and none the top.
MAY_IMPORT = {
    "tensors": "",
    "core": "tensors",
    "structure": "tensors core",
    "targets": "tensors core structure",
    "adapters": "tensors core",
    "adapters.bottleneck": "tensors core adapters",
    "adapters.low_rank": "tensors core adapters",
    "adapters.virtual_tokens": "tensors core structure",
    "methods": "tensors core structure targets adapters adapters.bottleneck adapters.low_rank adapters.virtual_tokens",
    "operations": "tensors core structure targets adapters adapters.bottleneck adapters.low_rank methods",
    "files": "",
    "formats": "core structure targets adapters.low_rank files formats.counterparts formats.additions",
    "formats.counterparts": "tensors core targets adapters.low_rank adapters.virtual_tokens methods formats",
    "formats.additions": "core structure targets adapters.low_rank methods formats formats.counterparts",
    "formats.peft_config": "core targets methods formats",
    "formats.foreign": "tensors core structure targets adapters.virtual_tokens methods files formats "
    "formats.counterparts",
    "formats.serving": "formats formats.counterparts",
    "storage": "tensors core structure targets operations files formats",
    "parsing": "core",
    "planning": "core structure adapters.virtual_tokens",
    "analysis": "tensors core adapters.low_rank operations files formats formats.counterparts",
    "callbacks": "tensors core structure files formats formats.serving storage analysis",
    "strategy": "tensors core structure targets operations files formats formats.peft_config storage callbacks "
    "strategy.optimizers strategy.bases",
    "strategy.optimizers": "tensors core operations storage",
    "strategy.bases": "tensors core operations files formats storage strategy strategy.optimizers",
    "tasks": "core structure adapters.virtual_tokens operations tasks.answers tasks.batches tasks.data "
    "tasks.pretrained",
    "tasks.answers": "core adapters.virtual_tokens",
    "tasks.data": "adapters.virtual_tokens tasks.batches tasks.pretrained",
    "tasks.batches": "tensors adapters.virtual_tokens",
    "tasks.pretrained": "",
    "comparison": "core operations files storage analysis callbacks",
    "cli": "core operations files formats.serving storage planning parsing analysis callbacks strategy "
    "strategy.bases tasks tasks.pretrained comparison cli.tools",
    "script": "cli",
    "cli.tools": "core operations files formats formats.foreign formats.serving storage analysis tasks.batches "
    "tasks.pretrained",
}
KNOW_LIGHTNING = {
    "callbacks",
    "comparison",
    "parsing",
    "strategy",
    "strategy.bases",
    "strategy.optimizers",
    "tasks",
    "tasks.data",
    "tasks.batches",
    "cli",
}
AT_THE_TOP = {"__init__.py", "__main__.py", "errors.py", "py.typed"}
# The judges in tests, and the other distribution of Lightning, whose classes pass no isinstance check of ours.
NEVER = {"peft", "loralib", "adapters", "pytorch_lightning", "lightning_fabric", "callbacks"}


def module_name(path: Path) -> str:
    """Return the name of a file's module, without the package's; a package is called as its folder is."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


SOURCES = {
    module_name(PACKAGE / path): path
    for path in (*PACKAGE.rglob("*.py"), *(PACKAGE / "callbacks").glob("*.py"))  # rglob follows no symlink
}


def package_of(module: str) -> str:
    return module if SOURCES[module].stem == "__init__" else module.rpartition(".")[0]


def imported(module: str) -> set[str]:
    """Every name that a module imports, anywhere in it: at the top, in a function, or for the type checker."""
    names = set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def modules_of_ours(names: set[str]) -> set[str]:
    """The modules of this package that ``names`` are, or are in."""
    found = set()
    for name in (name for name in names if name.split(".")[0] == PACKAGE.name):
        module = name.partition(".")[2]
        while module not in SOURCES:
            module = module.rpartition(".")[0]
        found.add(module)
    return found


IMPORTED = {module: imported(module) for module in SOURCES}
USES = {module: modules_of_ours(names) - {module} for module, names in IMPORTED.items()}
PACKAGES = {package_of(module) for module in SOURCES}
# Whoever imports a part of a package imports the package.
LOWER = sorted(
    module
    for module in SOURCES
    if module == "errors" or (package_of(module) and package_of(module).partition(".")[0] not in KNOW_LIGHTNING)
)


def said(package: str) -> str:
    """The sentence in a package's docstring on what it imports."""
    names = MAY_IMPORT[package].split()
    if not names:
        return "Imports no other package."
    return f"Imports {', '.join(names[:-1])}{' and ' if names[1:] else ''}{names[-1]}."


def test_the_table_has_every_package() -> None:
    assert {"", *MAY_IMPORT} == PACKAGES


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_what_the_table_says(package: str) -> None:
    modules = [module for module in SOURCES if package_of(module) == package]
    used = {package_of(other) for module in modules for other in USES[module] if other != "errors"} - {package}
    assert used == set(MAY_IMPORT[package].split())
    knows = any(name.split(".")[0] == "lightning" for module in modules for name in IMPORTED[module])
    assert knows == (package in KNOW_LIGHTNING)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_says_what_it_is_for_and_what_it_imports(package: str) -> None:
    docstring = ast.get_docstring(ast.parse(SOURCES[package].read_text(encoding="utf-8")))
    assert docstring is not None
    purpose, empty, *imports = docstring.split("\n")
    assert purpose.endswith(".")
    assert not empty
    assert " ".join(imports) == said(package)


@pytest.mark.parametrize("package", sorted(PACKAGES), ids=lambda name: name or "the top")
def test_the_parts_of_a_package_form_no_circle(package: str) -> None:
    """A part is a module, or a package in it as a whole: so no circle of modules is left, across packages or within."""
    prefix = f"{package}." if package else ""

    def part(module: str) -> str:
        return module.removeprefix(prefix).partition(".")[0] if module != package else "__init__"

    below = {module for module in SOURCES if module == package or module.startswith(prefix)}
    graph = defaultdict(set)
    for module in below:
        graph[part(module)] |= {part(other) for other in USES[module] & below} - {part(module)}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"circle of imports in {package or PACKAGE.name}: {' -> '.join(reversed(error.args[1]))}")


def test_packages_alone_stand_at_the_top() -> None:
    assert {path.name for path in PACKAGE.iterdir() if not path.is_dir()} == AT_THE_TOP
    assert not USES["errors"]


@pytest.mark.parametrize("package", sorted(MAY_IMPORT.keys() - {"methods", "formats.counterparts"}))
def test_a_package_can_be_taken_in_at_a_glance(package: str) -> None:
    """It has an ``__init__`` and about ten files; or a file a method, however many methods there are."""
    assert len([module for module in SOURCES if package_of(module) == package]) <= 13


@pytest.mark.parametrize("module", sorted(SOURCES), ids=lambda name: name or "the top")
def test_no_file_imports_what_the_package_does_without(module: str) -> None:
    assert not {name for name in IMPORTED[module] if name.split(".")[0] in NEVER}


def test_lower_modules_load_without_lightning(tmp_path: Path) -> None:
    """A stand-in takes the place of the package, whose own ``__init__`` imports the strategy and so Lightning."""
    code = """
import importlib, json, sys, types
package = types.ModuleType("lightning_peft")
package.__path__ = [sys.argv[1]]
sys.modules["lightning_peft"] = package
guilty = {}
for name in json.loads(sys.argv[2]):
    importlib.import_module(f"lightning_peft.{name}")
    for unwanted in json.loads(sys.argv[3]):
        if unwanted in sys.modules:
            guilty.setdefault(unwanted, name)
print(json.dumps(guilty))
"""
    arguments = [str(PACKAGE), json.dumps(LOWER), json.dumps(["lightning", *sorted(NEVER)])]
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {}
