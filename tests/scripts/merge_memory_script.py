"""Merges by the command and prints how far memory rose: ``merge_memory_script.py TINY ADAPTER BASE OUT``.

What is mapped of files that lie in the system's cache takes no memory of its own, and how much of them that is for one
element depends on the system: it is printed by itself.
"""

import sys
import threading
from pathlib import Path

from lightning_peft.cli.tools.merge import merge

KINDS = ("RssAnon", "RssFile")


def resident() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {kind: 1024 * int(line.split()[1]) for line in lines for kind in KINDS if line.startswith(kind)}


class Watch(threading.Thread):
    """Looks all the time at what is resident."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self._over = dict.fromkeys(KINDS, 0), threading.Event()

    def run(self) -> None:
        while not self._over.wait(5e-4):
            self.most = {kind: max(self.most[kind], now) for kind, now in resident().items()}

    def stop(self) -> None:
        self._over.set()
        self.join()


if __name__ == "__main__":
    tiny, adapter, base, out = sys.argv[1:]
    merge(f"{tiny}/adapter", f"{tiny}/base", f"{tiny}/out")  # what is imported and allocated once
    before, watch = resident(), Watch()
    watch.start()
    merge(adapter, base, out)
    watch.stop()
    print("rose by", *(watch.most[kind] - before[kind] for kind in KINDS))
