"""The notebooks run from their first cell to their last, without a display, on a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import model_and_data

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


def cells(notebook: Path, kind: str) -> list[str]:
    content = json.loads(notebook.read_text(encoding="utf-8"))
    assert content["nbformat"] == 4
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == kind]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook: Path, tmp_path: Path) -> None:
    model_and_data(tmp_path)
    # A cell's last expression is shown by a notebook, and is nothing to a script.
    script = tmp_path / "cells.py"
    script.write_text("\n\n".join(cells(notebook, "code")) + "\nprint('the end')\n", encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "DISPLAY"}
    environment |= {"EXAMPLES": str(ROOT / "examples"), "MPLBACKEND": "Agg"}
    environment |= {"NOTEBOOK_MODEL": str(tmp_path / "model"), "NOTEBOOK_STEPS": "2"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("the end\n")


def test_there_are_notebooks_that_say_what_they_are_for() -> None:
    assert len(NOTEBOOKS) == 2
    for notebook in NOTEBOOKS:
        first, *others = cells(notebook, "markdown")
        assert first.startswith("# ")
        assert others
