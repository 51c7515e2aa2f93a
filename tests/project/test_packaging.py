"""What an installed package holds: built from a clean copy of the tree, installed into an empty environment."""

import os
import shutil
import site
import subprocess
import sys
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path, cwd: Path, expect: int = 0, **variables: str) -> str:
    """Run a command and return what it printed."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == expect, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def clean_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git would hand to someone else: no build products, no ignored files."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout, to know which files belong to the project")
    tree = tmp_path_factory.mktemp("checkout")
    for name in filter(None, run("git", "ls-files", "-coz", "--exclude-standard", cwd=ROOT).split("\0")):
        if os.path.lexists(ROOT / name):  # not: deleted in the working tree, still in the index
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name, follow_symlinks=False)
    return tree


@pytest.fixture(scope="module")
def wheels(clean_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheels built straight from the tree, by way of a source distribution, and for an editable install."""
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir"]
    editable = "import sys; from setuptools.build_meta import build_editable; build_editable(sys.argv[1])"
    out = {route: tmp_path_factory.mktemp(route) for route in ("tree", "sdist", "editable")}
    run(*build, out["tree"], "--wheel", cwd=clean_tree)
    run(*build, out["sdist"], cwd=clean_tree)
    run(sys.executable, "-c", editable, out["editable"], cwd=clean_tree)
    return {route: next(folder.glob("*.whl")) for route, folder in out.items()}


@pytest.fixture(scope="module")
def environments(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For a plain and an editable install, the python of an otherwise empty environment that holds it."""
    pythons = {}
    for route in ("tree", "editable"):
        folder = tmp_path_factory.mktemp("environment")
        venv.create(folder, with_pip=False)
        python = folder / "bin" / "python"
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
        run(*pip, "--no-deps", "--no-index", wheels[route], cwd=folder)
        # Puts torch and lightning within reach. Python runs no .pth file of a folder that is named in one, so
        # the editable install in the environment of the tests stays out of it.
        (packages,) = folder.glob("lib/*/site-packages")
        (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
        pythons[route] = python
    return pythons


@pytest.mark.parametrize("route", ["tree", "sdist"])
def test_a_wheel_holds_the_files_of_the_tree(clean_tree: Path, wheels: dict[str, Path], route: str) -> None:
    expected = set()
    # The files of these folders are packaged from where they are.
    elsewhere = {
        "lightning_peft/callbacks": "callbacks",
        "lightning_peft/configs": "examples/configs",
        "lightning_peft_script": "lightning_peft/script",
    }
    for package, folder in {"lightning_peft": "lightning_peft", **elsewhere}.items():
        files = run("git", "ls-files", "-coz", "--exclude-standard", folder, cwd=ROOT).split("\0")
        paths = [Path(name) for name in filter(None, files) if (clean_tree / name).is_file()]
        expected |= {f"{package}/{path.relative_to(folder).as_posix()}" for path in paths}
    expected -= {name for name in expected if name.startswith("lightning_peft/script/")}
    with zipfile.ZipFile(wheels[route]) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == expected
    assert "lightning_peft/py.typed" in packed


@pytest.mark.parametrize("route", ["tree", "editable"])
def test_an_empty_environment_imports_the_package(
    clean_tree: Path, environments: dict[str, Path], route: str, tmp_path: Path
) -> None:
    code = """
        import importlib.util
        import lightning_peft, lightning_peft.callbacks
        print(lightning_peft.__file__, lightning_peft.callbacks.__file__, sep="\\n")
        print(importlib.util.find_spec("callbacks"))
    """
    python = environments[route]
    printed = run(python, "-c", textwrap.dedent(code), cwd=tmp_path).splitlines()
    package, callbacks, bare = printed[-3:]
    home = clean_tree if route == "editable" else python.parents[1]
    assert Path(package).is_relative_to(home)
    assert Path(callbacks).is_relative_to(home)
    assert bare == "None"


@pytest.mark.parametrize("route", ["tree", "editable"])
def test_the_command_is_installed(environments: dict[str, Path], route: str, tmp_path: Path) -> None:
    printed = run(environments[route].with_name("lightning-peft"), "--help", cwd=tmp_path)
    for command in ("fit", "validate", "test", "predict", "inspect"):
        assert command in printed


@pytest.mark.parametrize("route", ["tree", "editable"])
def test_the_commands_help_imports_neither_torch_nor_lightning(
    environments: dict[str, Path], route: str, tmp_path: Path
) -> None:
    """By the modules that are there when it has printed: importing those takes seconds."""
    code = """
        import importlib.metadata, sys
        (script,) = importlib.metadata.entry_points(group="console_scripts", name="lightning-peft")
        main = script.load()
        for option in ("--help", "-h", "--version"):
            sys.argv = ["lightning-peft", option]
            main()
        print(sorted({"torch", "lightning", "lightning_peft", "jsonargparse"} & set(sys.modules)))
    """
    printed = run(environments[route], "-c", textwrap.dedent(code), cwd=tmp_path)
    assert printed.count("Print version and exit.") == 2
    assert printed.splitlines()[-1] == "[]"


@pytest.mark.parametrize("route", ["tree", "checkout"])
def test_a_type_checker_resolves_the_callbacks(
    clean_tree: Path, environments: dict[str, Path], route: str, tmp_path: Path
) -> None:
    """In the wheel, and through the link in a checkout: the one deliberate error is found and nothing else."""
    snippet, config = tmp_path / "snippet.py", tmp_path / "mypy.ini"
    snippet.write_text("from lightning_peft.callbacks import AdapterCheckpoint, NoSuchCallback\n")
    others = ",".join(f"{name}.*" for name in ("torch", "lightning", "transformers", "torchmetrics", "jsonargparse"))
    config.write_text(f"[mypy]\n[mypy-{others}]\nfollow_imports = skip\n")
    where = {"MYPYPATH": str(clean_tree)} if route == "checkout" else {}
    python = environments["tree"] if route == "tree" else sys.executable
    command = [sys.executable, "-m", "mypy", "--config-file", config, "--cache-dir", tmp_path / "cache"]
    printed = run(*command, "--python-executable", python, snippet, cwd=tmp_path, expect=1, **where)
    errors = [line for line in printed.splitlines() if line.startswith("snippet.py:") and ": error: " in line]
    assert len(errors) == 1, printed
    assert 'Module "lightning_peft.callbacks" has no attribute "NoSuchCallback"' in errors[0]
