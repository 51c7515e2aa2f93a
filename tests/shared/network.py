"""Two nodes on one machine: network namespaces joined by a cable, which see each other and nothing else."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from launch import clean_environment


@dataclass
class Node:
    """One namespace, with its end of the cable and the processes started in it."""

    name: str
    interface: str
    address: str
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, command: list[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
        """Start a command in the namespace; what it prints is added to ``log``."""
        with log.open("ab") as output:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**clean_environment(), "GLOO_SOCKET_IFNAME": self.interface, **environment},
            )
        self.processes.append(process)
        return process

    def kill(self) -> None:
        """Kill every process in the namespace, as a power cut would; launchers give workers sessions of their own."""
        pids = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True).stdout
        for pid in map(int, pids.split()):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for process in self.processes:
            process.wait(timeout=30)
        self.processes.clear()


def why_not() -> str | None:
    """Why namespaces cannot be made here, or None if they can."""
    if shutil.which("ip") is None:
        return "needs the command ip (Debian: apt-get install iproute2)"
    name = f"lp{os.getpid()}x"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    try:
        if made.returncode == 0:
            # A sandbox may allow namespaces, but no cables.
            cable = ["ip", "-n", name, "link", "add", "end0", "type", "veth", "peer", "name", "end1"]
            made = subprocess.run(cable, capture_output=True, text=True)
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return f"network namespaces may not be made here: {made.stderr.strip()}" if made.returncode else None


@contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Make two nodes; on exit kill what runs on them and take them away, whatever happened."""
    names = [f"lp{os.getpid()}{end}" for end in "ab"]
    nodes = [Node(name, f"{name}v", f"10.77.0.{number}") for number, name in enumerate(names, start=1)]
    first, second = nodes
    try:
        for node in nodes:
            _ip("netns", "add", node.name)
        _ip("-n", first.name, "link", "add", first.interface, "type", "veth", "peer", "name", second.interface)
        _ip("-n", first.name, "link", "set", second.interface, "netns", second.name)
        for node in nodes:
            _ip("-n", node.name, "addr", "add", f"{node.address}/24", "dev", node.interface)
            for interface in ("lo", node.interface):
                _ip("-n", node.name, "link", "set", interface, "up")
        yield first, second
    finally:
        for node in nodes:
            if Path("/run/netns", node.name).exists():
                node.kill()
                # The cable goes with the namespace that holds an end of it.
                _ip("netns", "del", node.name)


def wait_for(condition: Callable[[], object], what: str, seconds: float = 120) -> None:
    """Wait until ``condition`` holds.

    Raises:
        TimeoutError: It does not within ``seconds``.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds:.0f} seconds")
        time.sleep(0.1)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
