"""The container's file: against what the tree has, and by a linter. No builder is at hand where the tests run."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import entry_points, metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "examples" / "launch" / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """Return the instructions, each with what it is given, continued lines as one."""
    lines = [line for line in FILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    return re.findall(r"^([A-Z]+) (.*)$", "\n".join(lines).replace("\\\n", " "), flags=re.MULTILINE)


def of(kind: str) -> list[str]:
    return [given for instruction, given in instructions() if instruction == kind]


def copied() -> list[str]:
    """Return what is copied out of the tree: all words but the last, which is the place in the image."""
    return [word.rstrip("/") for given in of("COPY") if "--from=" not in given for word in given.split()[:-1]]


def test_what_it_copies_is_there_and_is_sent_to_the_builder() -> None:
    assert copied()
    assert [name for name in copied() if not (ROOT / name).exists()] == []
    ignored = FILE.with_name("Dockerfile.dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    assert sorted(line[1:] for line in ignored if line.startswith("!")) == sorted(copied())


def test_links_within_the_package_lead_to_what_is_copied() -> None:
    links = [path for path in (ROOT / "lightning_peft").iterdir() if path.is_symlink()]
    assert links
    assert {path.resolve().relative_to(ROOT).as_posix() for path in links} <= set(copied())


def test_its_base_is_pinned_and_its_user_is_not_root() -> None:
    bases = {given.split()[0] for given in of("FROM")}
    assert len(bases) == 1
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", bases.pop())
    assert of("USER")[-1] == "1000:1000"


def test_it_runs_the_command_of_the_package() -> None:
    assert of("ENTRYPOINT") == ['["lightning-peft"]']
    assert entry_points(group="console_scripts", name="lightning-peft")
    extras = {extra for given in of("RUN") for extra in re.findall(r"'\.\[(\w+)\]'", given)}
    assert extras
    assert extras <= set(metadata("lightning_peft").get_all("Provides-Extra") or [])


@pytest.mark.parametrize("command", of("RUN"))
def test_its_shell_code_is_sound(command: str) -> None:
    subprocess.run(["bash", "-n"], input=command, text=True, check=True)


@pytest.mark.parametrize("name", ["kubeflow_pytorchjob.yaml", "kubeflow_trainjob.yaml"])
def test_a_cluster_file_that_needs_an_image_names_it(name: str) -> None:
    text = FILE.with_name(name).read_text()
    assert "image: " in text
    assert "examples/launch/Dockerfile" in text


def test_a_linter_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("needs hadolint")
    done = subprocess.run([hadolint, FILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
