"""Starting processes that find what tests share."""

import os
import random
import socket
import subprocess
import sys
from pathlib import Path

# Scripts import what tests share, and one another.
_PATH = [str(Path(__file__).parents[1] / folder) for folder in ("shared", "scripts")]

# What an earlier launch in this process may have set.
_LEFT_OVER = ("LOCAL_RANK", "NODE_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED")


def clean_environment() -> dict[str, str]:
    """Give this process's environment without what a launcher may have left in it, with the way to what tests share."""
    kept = {key: value for key, value in os.environ.items() if key not in _LEFT_OVER and not key.startswith("SLURM_")}
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, [*_PATH, os.environ.get("PYTHONPATH")]))}


def free_port() -> int:
    """Find a port for processes to meet at, among those that the system does not give to outgoing connections.

    Lightning asks the system for one, and another test's connection may have got it before the processes listen.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 30_000)
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) != 0:
                return port


def run_script(script: str, *args: object, timeout: int = 300, **environment: str) -> str:
    """Run ``script``, which starts further processes itself, and return what was written to both outputs."""
    result = subprocess.run(
        [sys.executable, script, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        env={**clean_environment(), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **environment},
    )
    assert result.returncode == 0, result.stdout[-6000:]
    return result.stdout
