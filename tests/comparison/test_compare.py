"""`lightning-peft compare`: runs that die and resume, the choice, the table; the judges are runs without it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from comparable import Known, grid_file

from lightning_peft.cli import PEFTCLI, main
from lightning_peft.cli import cells as process
from lightning_peft.comparison import machine, origins
from lightning_peft.comparison.results import read_json

SHARED = str(Path(__file__).resolve().parents[1] / "shared")


def compare(capsys: Any, *arguments: Any) -> tuple[str, str]:
    """Return what the command prints, and its error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["compare", *map(str, arguments)])
    return capsys.readouterr().out, "" if stop.value.code == 0 else str(stop.value.code)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / "runs.jsonl").read_text().splitlines()]


class Done:
    """A job that has ended."""

    job_id, state = "0", "FINISHED"

    def done(self) -> bool:
        return True


def in_this_process(started: list[list[str]]) -> Any:
    """What stands in for a job: its runs cost a tenth here. ``started`` gets the names of the runs of each job."""

    def submit(self: machine.Machine, directories: Any, slot: int) -> Done:
        started.append([str((read_json(directory / "request.json") or {})["name"]) for directory in directories])
        for directory in directories:
            if (read_json(directory / "request.json") or {})["probe"]:
                process.probe(directory)
            try:
                process.run(directory)
            except Exception as error:
                process.fail(directory, f"{type(error).__name__}: {error}")
        return Done()

    return submit


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Runs in this process; the names of those that were started."""
    started: list[list[str]] = []
    monkeypatch.setattr(machine.Machine, "submit", in_this_process(started))
    return started


def trained(config: Any, folder: Path, *stages: str) -> dict[str, float]:
    """Return what a run of a config logs, by Lightning's own command."""
    config["trainer"] |= {"default_root_dir": str(folder), "enable_progress_bar": False}
    (folder / "alone.yaml").write_text(yaml.safe_dump(config))
    command = PEFTCLI(["fit", f"--config={folder / 'alone.yaml'}"])
    logged: dict[str, float] = {}
    for stage in stages:
        getattr(command.trainer, stage)(command.model, verbose=False)
        logged |= {name: float(value) for name, value in command.trainer.callback_metrics.items()}
    return logged


def test_three_by_two(tmp_path: Path, capsys: Any, caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of their own by submitit: one is killed, others go on, and the next command does what is missing."""
    monkeypatch.setenv("PYTHONPATH", SHARED, prepend=":")
    bundles = {
        "r1": {"rank": 1},
        "r2": {"rank": 2, "model.dies_with": 1},
        "r3": {"rank": 3},
    }
    file = grid_file(tmp_path, axes={"rank": bundles, "seed": [0, 1]})
    out, error = compare(capsys, file, "--per_job=6")
    assert error == "lightning-peft: error: 1 of 3 cells have failed; the table says why."
    assert "r2, seed=1: failed: killed by SIGKILL, perhaps for want of memory (log: " in out
    found = lines(tmp_path)
    assert [line["failure"] is None for line in found] == [True, True, True, False, True, True]
    died = Path(found[3]["directory"])
    assert (died / "checkpoints" / "last").exists()

    untouched = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").glob("*/result.json")}
    assert len(untouched) == 5
    started: list[list[str]] = []
    monkeypatch.setattr(machine.Machine, "submit", in_this_process(started))
    out, error = compare(capsys, file)
    assert not error
    assert started == [["r2, seed=1"]]
    assert "[5/6] are there already" in out
    assert f"Restored all states from the checkpoint at {died / 'checkpoints' / 'last'}" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in out

    values = {}
    for line in lines(tmp_path):
        assert line["trained_parameters"] == 8 * int(line["cell"][1])
        assert line["seconds_per_step"] > 0
        assert line["peak_memory"] > 2**20
        kept = [path for path in Path(line["directory"], "trained").iterdir() if path.name != "trainer_state.ckpt"]
        assert line["bytes"] == sum(path.stat().st_size for path in kept)
        assert line["latency"]["seconds"] > 0
        if line["cell"] != "r1" and line["directory"] != str(died):
            continue
        config = yaml.safe_load((tmp_path / "run.yaml").read_text())
        config["seed_everything"] = int(line["seed"])
        config["trainer"]["strategy"]["init_args"]["method"]["init_args"]["r"] = int(line["cell"][1])
        config["trainer"]["strategy"]["init_args"]["merge_on_train_end"] = False
        config["model"] = {"class_path": "comparable.Known", "init_args": {"lr": 0.01}}
        alone = trained(config, tmp_path, "validate", "test")
        assert line["validate"]["val_loss"] == alone["val_loss"]
        assert line["test"]["test_loss"] == alone["test_loss"]
        values[line["cell"], line["seed"]] = alone["test_loss"]
    first = [values["r1", seed] for seed in ("0", "1")]
    mean, deviation = np.mean(first), np.std(first, ddof=1)
    half = 12.7062 * deviation / np.sqrt(2)
    shown = f"{mean:.4g} ± {deviation:.2g} [{mean - half:.4g}, {mean + half:.4g}]"
    assert shown in next(line for line in table.splitlines() if line.startswith("| r1 |"))


def test_the_rate_is_chosen_on_validation(tmp_path: Path, here: list[list[str]], capsys: Any) -> None:
    """The best rates are known; by test data others would be chosen."""
    bundles = {"fast": {"rank": 1, "model.best": 0.01}, "slow": {"rank": 2, "model.best": 0.0001}}
    file = grid_file(
        tmp_path,
        axes={"cell": bundles, "lr": [0.01, 0.001, 0.0001]},
        choose={"axis": "lr", "metric": "val_score", "mode": "max"},
        report={"validate": ["val_score"], "test": ["test_score"]},
    )
    out, error = compare(capsys, file, "--json")
    assert not error
    objects = [json.loads(line) for line in out.splitlines() if line.startswith("{")]  # beside Lightning's table
    rows = {row["cell"]: row for row in objects}
    assert {name: row["chosen"] for name, row in rows.items()} == {"fast": "0.01", "slow": "0.0001"}
    assert rows["fast"]["metrics"]["val_score"]["values"] == [0]
    found = lines(tmp_path)
    assert len(found) == 2 * 3
    for line in found:
        assert ("test" in line) == line["compared"] == (line["candidate"] == rows[line["cell"]]["chosen"])
        assert Path(line["directory"], "trained").exists() == line["compared"]
        # What a candidate had trained is evaluated, and not trained anew.
        assert line["steps"] == 4
    assert [len(job) for job in here] == [1] * (6 + 2)


def test_a_broken_cell_and_a_diverged_candidate(tmp_path: Path, here: list[list[str]], capsys: Any) -> None:
    bundles = {"works": {"rank": 1}, "breaks": {"rank": 2, "model.breaks": True}}
    file = grid_file(
        tmp_path,
        axes={"cell": bundles, "lr": [0.01, 1.0e30]},
        choose={"axis": "lr", "metric": "val_loss", "mode": "min"},
        keep_adapters=False,
    )
    out, error = compare(capsys, file)
    assert error == "lightning-peft: error: 1 of 2 cells have failed; the table says why."
    assert "- works, lr=1.0e+30: diverged after " in out
    assert "- breaks, lr=0.01: failed: RuntimeError: broken on purpose with a second line (log: " in out
    assert "- breaks: none of its candidates has a val_loss to choose by" in out
    assert "| works | 0.01 | 1 |" in out
    assert "| breaks | - | 0 | - |" in out
    assert not list((tmp_path / "out").glob("runs/*/trained"))
    assert lines(tmp_path)[0]["bytes"] > 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"report": {"test": ["test_los"]}}, "test logs no 'test_los'. It logs test_loss, test_score."),
        ({"report": {"validate": ["test_loss"]}}, "validate logs no 'test_loss'. It logs val_loss, val_score."),
    ],
)
def test_a_metric_that_no_run_logs(
    changes: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """It is found before anything is trained."""

    class Started(Done):
        def done(self) -> bool:
            return False

    def submit(self: machine.Machine, directories: Any, slot: int) -> Started:
        process.probe(directories[0])
        return Started()

    monkeypatch.setattr(machine.Machine, "submit", submit)
    monkeypatch.setattr(machine.Machine, "end", lambda *_: None)
    monkeypatch.setattr(Known, "training_step", lambda *_: pytest.fail("a run was trained"))
    _, error = compare(capsys, grid_file(tmp_path, **changes))
    assert said in error


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_comparison_that_is_told_to_end_leaves_no_job_at_work(tmp_path: Path) -> None:
    file = grid_file(tmp_path, axes={"rank": [1, 2]}, set={"model.waits": 1.0, "trainer.max_epochs": 1000})
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([SHARED, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "lightning_peft", "compare", str(file)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_until(lambda: bool(at_work(tmp_path)) and any(tmp_path.glob("out/runs/*/log.txt")))
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert said.endswith("lightning-peft: stopped. The same command does what is missing.\n")
    wait_until(lambda: not at_work(tmp_path))


def at_work(folder: Path) -> list[str]:
    """Return the processes that have a path under ``folder`` among their arguments."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found += [entry.parent.name] if str(folder / "out").encode() in entry.read_bytes() else []
    return found


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.2)
    pytest.fail("It did not come about within two minutes.")


def test_results_of_two_versions_are_told_apart(
    tmp_path: Path, here: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Also of a run that one version began and another went on with."""
    out, _ = compare(capsys, grid_file(tmp_path, axes={"rank": [1, 2]}, report={"validate": ["val_loss"]}))
    assert "Not all runs are made from the same" not in out
    (first,) = {json.dumps(line["origins"]) for line in lines(tmp_path)}
    monkeypatch.setattr(origins, "_code", lambda: "another")
    out, _ = compare(capsys, grid_file(tmp_path, axes={"rank": [1, 2]}))
    assert "are there already" not in out
    for line in lines(tmp_path):
        assert [*json.loads(first), line["origins"][-1]] == line["origins"]
        assert line["origins"][-1]["lightning_peft"].endswith("(another)")
    assert "Not all runs are made from the same: lightning_peft " in out
    assert "(another). Remove a run's directory to have it made anew." in out


def test_another_grid_takes_no_result_of_this_one(tmp_path: Path, here: list[list[str]], capsys: Any) -> None:
    axes = {"rank": [1, 2]}
    compare(capsys, grid_file(tmp_path, axes=axes))
    assert len(here) == 2
    out, _ = compare(capsys, grid_file(tmp_path, axes=axes))
    assert len(here) == 2
    assert "[2/2] are there already" in out
    compare(capsys, grid_file(tmp_path, axes=axes, set={"model.lr": 0.02}))
    assert len(here) == 4
    # Another metric of the same runs is in their results, and asks for none.
    compare(capsys, grid_file(tmp_path, axes=axes, set={"model.lr": 0.02}, report={"validate": ["val_score"]}))
    assert len(here) == 4


def test_one_comparison_at_a_time(tmp_path: Path, here: list[list[str]], capsys: Any) -> None:
    from lightning_peft.comparison.results import locked

    with locked(tmp_path / "out"):
        _, error = compare(capsys, grid_file(tmp_path))
    assert "Another comparison is at work" in error


def test_without_submitit_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    _, error = compare(capsys, grid_file(tmp_path))
    assert "pip install 'lightning_peft[compare]'" in error


def test_each_job_has_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    place = machine.Machine("local", None, 1, tmp_path, {})
    assert place.jobs == 2
    monkeypatch.setattr(place._executor, "submit", commands.append)
    for slot in range(3):
        place.submit([tmp_path / "a", tmp_path / "b"], slot)
    assert [command.env["CUDA_VISIBLE_DEVICES"] for command in commands] == ["3", "5", "3"]
    run = ["-m", "lightning_peft.cli.cells", str(tmp_path / "a"), str(tmp_path / "b")]
    assert commands[0].command[-5:] == [sys.executable, *run]


@pytest.mark.parametrize("arguments", [["--jobs=0"], ["--per_job=0"]])
def test_no_jobs_are_refused(arguments: list[str], tmp_path: Path, capsys: Any) -> None:
    _, error = compare(capsys, grid_file(tmp_path), *arguments)
    assert "both are 1 or more" in error


def test_an_unknown_parameter_of_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    _, error = compare(capsys, grid_file(tmp_path, slurm={"slurm_partiton": "p"}), "--cluster=slurm")
    assert "partiton" in error
