"""The help that the installed command prints without importing the package, against that of the whole parser."""

import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

import lightning_peft
from lightning_peft.cli import main


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The module as it is installed: on its own, not in the package."""
    spec = spec_from_file_location("lightning_peft_script", Path(lightning_peft.__path__[0], "script", "__init__.py"))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("width", ["60", "80", "200"])
@pytest.mark.parametrize("option", ["--help", "-h", "--version"])
def test_what_is_printed_at_once_is_what_the_whole_command_prints(
    script: ModuleType, option: str, width: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setattr(sys, "argv", ["lightning-peft", option])
    with pytest.raises(SystemExit) as stop:
        main([option])
    assert not stop.value.code
    whole = capsys.readouterr()
    script.main()
    at_once = capsys.readouterr()
    assert at_once.out == whole.out
    assert at_once.err == whole.err == ""


@pytest.mark.parametrize("arguments", [[], ["inspect", "--help"], ["--help", "inspect"], ["fit", "--no_such_option"]])
def test_all_else_is_handed_over(
    script: ModuleType, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-peft", *arguments])
    with pytest.raises(SystemExit) as whole:
        main(arguments)
    expected = capsys.readouterr()
    with pytest.raises(SystemExit) as handed:
        script.main()
    assert handed.value.code == whole.value.code
    assert capsys.readouterr() == expected


@pytest.mark.parametrize(("given", "guess"), [("mrege", "Did you mean 'merge'? The"), ("xyz", "The")])
def test_a_command_that_there_is_not(
    script: ModuleType, given: str, guess: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-peft", given, "a", "b"])
    with pytest.raises(SystemExit) as at_once:
        script.main()
    said = capsys.readouterr().err
    assert said.startswith(f"lightning-peft: error: There is no command {given!r}. {guess} commands are fit, validate,")
    # The whole parser does not know it either, and ends so.
    with pytest.raises(SystemExit) as whole:
        main([given, "a", "b"])
    assert at_once.value.code == whole.value.code == 2


def test_a_mistake_ends_the_process_as_the_whole_command_does(script: ModuleType, tmp_path: Path) -> None:
    code = f"import runpy, sys; sys.argv[1:] = ['inspect', 'no_such']; runpy.run_path({script.__file__!r})['main']()"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no_such does not exist" in done.stderr
