"""A SLURM cluster of two nodes on this machine, in a temporary folder."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from launch import clean_environment
from network import wait_for

DAEMONS = ("munged", "slurmctld", "slurmd")

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
SlurmUser=root
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ReturnToService=2
KillWait=10
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=2
PartitionName=p Nodes=n1,n2 Default=YES State=UP OverSubscribe=YES
"""


@dataclass
class Cluster:
    """Where the cluster's files are, and its commands."""

    folder: Path

    def run(self, *command: str, **environment: str) -> str:
        """Run a command of SLURM and return what it printed."""
        variables = {**clean_environment(), "SLURM_CONF": str(self.folder / "slurm.conf"), **environment}
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=variables)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def state(self, job: str) -> dict[str, str]:
        """Return what ``scontrol`` says of a job, such as its JobState."""
        words = self.run("scontrol", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)


def why_not() -> str | None:
    """Why there can be no SLURM here, or None."""
    if missing := [name for name in DAEMONS if shutil.which(name) is None]:
        return f"needs {', '.join(missing)} (Debian: apt-get install slurm-wlm munge)"
    return None if os.getuid() == 0 else "needs root, to start SLURM's daemons"


@contextmanager
def two_nodes(folder: Path) -> Iterator[Cluster]:
    """Start SLURM's daemons; on exit cancel what runs and stop them."""
    for name in ("state", "spool-n1", "spool-n2"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    controller, first, second = _free_ports(3)
    text = CONFIG.format(host=socket.gethostname(), folder=folder, controller=controller, first=first, second=second)
    (folder / "slurm.conf").write_text(text)
    cluster = Cluster(folder)
    with ExitStack() as daemons:
        names = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        daemons.enter_context(_daemon(["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *names]))
        wait_for((folder / "munge.socket").exists, "munged", 20)
        daemons.enter_context(_daemon(["slurmctld", "-D", "-f", f"{folder}/slurm.conf"]))
        for node in ("n1", "n2"):
            daemons.enter_context(_daemon(["slurmd", "-D", "-f", f"{folder}/slurm.conf", "-N", node]))
        wait_for(lambda: _idle(cluster) == 2, "two idle nodes", 60)
        try:
            yield cluster
        finally:
            cluster.run("scancel", "--full", "--signal=KILL", "--me")
            cluster.run("scancel", "--me")
            wait_for(lambda: not cluster.run("squeue", "--noheader"), "the end of all jobs", 60)


@contextmanager
def _daemon(command: list[str]) -> Iterator[None]:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=20)


def _idle(cluster: Cluster) -> int:
    try:
        return cluster.run("sinfo", "--noheader", "--Node", "--format=%t").split().count("idle")
    except RuntimeError:
        return 0


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
