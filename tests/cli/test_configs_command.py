"""`lightning-peft configs` from within the package's own folder of configs."""

from pathlib import Path

import pytest
from read_config import CONFIGS

from lightning_peft.cli import main


def run(*words: str, code: int = 0) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["configs", *words])
    assert ended.value.code == code


def test_every_config_is_listed_by_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    run()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(file.stem for file in CONFIGS.glob("*.yaml"))
    assert all(len(line.split()) > 4 for line in lines)


def test_one_is_copied_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run("copy", "one_gpu")
    assert (tmp_path / "one_gpu.yaml").read_bytes() == (CONFIGS / "one_gpu.yaml").read_bytes()
    assert "lightning-peft fit --config one_gpu.yaml" in capsys.readouterr().out
    (tmp_path / "one_gpu.yaml").write_text("mine")
    with pytest.raises(SystemExit, match=r"one_gpu\.yaml exists"):
        main(["configs", "copy", "one_gpu.yaml"])
    assert (tmp_path / "one_gpu.yaml").read_text() == "mine"
    run("copy", "one_gpu", "--out", "other.yaml")
    assert (tmp_path / "other.yaml").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["copy", "one_gup"], "Did you mean 'one_gpu'"),
        (["copy"], "configs copy NAME"),
        (["delete", "one_gpu"], "configs copy NAME"),
        (["copy", "one_gpu", "--out", "missing/one.yaml"], "missing/one.yaml cannot be written"),
    ],
)
def test_mistakes(words: list[str], said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        main(["configs", *words])
