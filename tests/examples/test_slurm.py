"""The SLURM script on a cluster of two nodes: put back into the queue, it ends with the weights of one process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm
import torch
from cluster import config, model_and_data, run_alone
from network import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(reason := slurm.why_not()), reason=str(reason))]

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "launch" / "slurm.sbatch"
# What is smaller here than in the script: no GPUs, one process on each node.
HERE = ["--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--time=00:30:00"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Cluster]:
    with slurm.two_nodes(tmp_path_factory.mktemp("slurm")) as running:
        yield running


def submit(cluster: slurm.Cluster, run: Path) -> str:
    """Submit the script and return the number of the job."""
    environment = {
        "CONFIG": str(run),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        # The names of these nodes mean nothing outside SLURM: both are this machine.
        "MASTER_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return cluster.run("sbatch", "--parsable", *HERE, f"--output={run.parent}/log", str(SCRIPT), **environment)


def finish(cluster: slurm.Cluster, job: str, log: Path) -> str:
    """Wait for the end of a job and return its log."""
    ends = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
    wait_for(lambda: cluster.state(job)["JobState"] in ends, "the end of the job", 180)
    printed = log.read_text(errors="replace")
    assert cluster.state(job)["JobState"] == "COMPLETED", printed[-6000:]
    return printed


def adapters(out: Path, rank: int) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(out / f"rank{rank}.pt", weights_only=True)
    return state


def test_a_job_near_its_end_is_put_back_and_resumes(cluster: slurm.Cluster, tmp_path: Path) -> None:
    model_and_data(tmp_path)
    run_alone(config(tmp_path, nodes=1, batch=8, out=tmp_path / "alone"))
    undisturbed = config(tmp_path, nodes=2, batch=4, out=tmp_path / "undisturbed")
    finish(cluster, submit(cluster, undisturbed), undisturbed.parent / "log")

    run = config(tmp_path, nodes=2, batch=4, out=tmp_path / "requeued", hold=3)
    job = submit(cluster, run)
    wait_for(lambda: all((run.parent / f"waits{rank}").exists() for rank in (0, 1)), "step 3 on both nodes")
    # What SLURM does for the line --signal=B:SIGUSR1 of the script when the time is near.
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait_for(lambda: cluster.state(job)["JobState"] == "PENDING", "the requeue")
    (run.parent / "go").touch()
    # SLURM keeps a requeued job back for a while.
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")
    printed = finish(cluster, job, run.parent / "log")
    assert cluster.state(job)["Restarts"] == "1"
    assert f"Restored all states from the checkpoint at {run.parent / 'checkpoints' / 'last'}" in printed

    alone = adapters(tmp_path / "alone", 0)
    for rank in (0, 1):
        ours, judge = adapters(run.parent, rank), adapters(undisturbed.parent, rank)
        assert ours.keys() == judge.keys() == alone.keys()
        assert all(torch.equal(ours[name], judge[name]) for name in judge)
        for name, value in alone.items():
            torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-6)


def test_the_script_asks_for_the_signal_that_it_handles() -> None:
    script = SCRIPT.read_text()
    for line in ("#SBATCH --requeue", "#SBATCH --signal=B:SIGUSR1@120", "#SBATCH --open-mode=append"):
        assert f"\n{line}\n" in script


def test_a_failing_run_fails_the_job(cluster: slurm.Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path / "no-such-config.yaml")
    wait_for(lambda: cluster.state(job)["JobState"] == "FAILED", "the failure")
    assert cluster.state(job)["ExitCode"] != "0:0"
