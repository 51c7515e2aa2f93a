"""All questions but ``compiled``, one after the other, each in a process of its own; then the picture."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.plot import draw_run
from benchmarks.report import OUT

QUESTIONS = (
    "launches",
    "bounds",
    "host_time",
    "kept_bytes",
    "peak_memory",
    "checkpoints",
    "traffic",
    "lifecycle",
    "inference",
    "per_sample",
    "strategy",
    "ideas",
    "ways",
    "step_time",
)

# What is counted is the same on every device.
ON_GPU = ("step_time", "graphs", "ways", "ideas", "peak_memory", "inference", "per_sample")


def main() -> int:
    """Return the number of questions that failed."""
    failed = []
    for question in ON_GPU if "cuda" in sys.argv else QUESTIONS:
        command = [sys.executable, "-m", f"benchmarks.{question}", *sys.argv[1:]]
        if subprocess.run(command, check=False).returncode:
            failed.append(question)
    picture = draw_run(OUT)
    print(f"Tables in {OUT}, " + (f"a picture in {picture}." if picture else "no picture: there is nothing to draw."))
    if failed:
        print(f"Failed: {', '.join(failed)}.")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
