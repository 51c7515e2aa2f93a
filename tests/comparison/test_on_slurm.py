"""A grid on a SLURM cluster, by submitit, and a dead job that takes no other along."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import slurm
from comparable import grid_file

from lightning_peft.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(reason := slurm.why_not()), reason=str(reason))]

SHARED = str(Path(__file__).resolve().parents[1] / "shared")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Cluster]:
    with slurm.two_nodes(tmp_path_factory.mktemp("slurm")) as running:
        yield running


def test_a_grid_on_two_nodes(
    cluster: slurm.Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("SLURM_CONF", str(cluster.folder / "slurm.conf"))
    monkeypatch.setenv("PYTHONPATH", SHARED, prepend=":")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    file = grid_file(
        tmp_path,
        axes={"rank": [1, 2], "lr": [0.01, 0.0001], "seed": [0, 1]},
        choose={"axis": "lr", "metric": "val_score", "mode": "max"},
        slurm={"slurm_partition": "p", "cpus_per_task": 1, "timeout_min": 10},
    )
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(file), "--cluster=slurm", "--per_job=2"])
    out = capsys.readouterr().out
    assert stop.value.code == 0, out
    found = [json.loads(line) for line in (tmp_path / "out" / "runs.jsonl").read_text().splitlines()]
    assert len(found) == 6
    assert {line["candidate"] for line in found if line["compared"]} == {"0.01"}
    assert all(line["test"]["test_loss"] > 0 for line in found if line["compared"])
    assert (tmp_path / "out" / "table.md").read_text() in out
    assert os.listdir(tmp_path / "out" / "jobs")


def test_a_job_that_is_killed(
    cluster: slurm.Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The cluster keeps no accounts, so that nothing but the queue tells that a job is no more."""
    monkeypatch.setenv("SLURM_CONF", str(cluster.folder / "slurm.conf"))
    monkeypatch.setenv("PYTHONPATH", SHARED, prepend=":")
    bundles = {"works": {"rank": 1}, "cancels": {"rank": 2, "model.cancels": True}}
    slurm_parameters = {"slurm_partition": "p", "cpus_per_task": 1, "timeout_min": 10}
    file = grid_file(tmp_path, axes={"cell": bundles}, slurm=slurm_parameters)
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(file), "--cluster=slurm"])
    out = capsys.readouterr().out
    assert stop.value.code == "lightning-peft: error: 1 of 2 cells have failed; the table says why."
    assert "- cancels: failed: " in out
    assert "| works | 1 |" in out
