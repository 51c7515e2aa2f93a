"""Starting a script of the tests in processes of its own."""

import os
import subprocess
import sys
from pathlib import Path

# Scripts import what tests share, and one another.
PATH = os.pathsep.join(str(Path(__file__).parents[1] / folder) for folder in ("shared", "scripts"))

# What an earlier launch in this process may have set.
_LEFT_OVER = ("LOCAL_RANK", "NODE_RANK", "MASTER_PORT", "WORLD_SIZE", "PL_GLOBAL_SEED")


def run_script(script: str, *args: object, timeout: int = 300, **environment: str) -> str:
    """Run ``script``, which starts further processes itself, and return what was written to both outputs."""
    inherited = {key: value for key, value in os.environ.items() if key not in _LEFT_OVER}
    result = subprocess.run(
        [sys.executable, script, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        env={
            **inherited,
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "PYTHONPATH": os.pathsep.join(filter(None, [PATH, os.environ.get("PYTHONPATH")])),
            **environment,
        },
    )
    assert result.returncode == 0, result.stdout[-6000:]
    return result.stdout
