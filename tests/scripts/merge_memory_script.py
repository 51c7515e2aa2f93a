"""Merges by the command and prints how far memory rose: ``merge_memory_script.py TINY ADAPTER BASE OUT``."""

import sys
from pathlib import Path

from lightning_peft.cli.tools.merge import merge


def peak() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


if __name__ == "__main__":
    tiny, adapter, base, out = sys.argv[1:]
    merge(f"{tiny}/adapter", f"{tiny}/base", f"{tiny}/out")  # what is imported and allocated once
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    merge(adapter, base, out)
    print("rose by", peak() - before)
