"""Every method on every base strategy, on two real processes, against one process on the same global batches.

`make test` runs a part of the cells, each row and each column in it; `make test-slow` the others.
"""

import importlib.util
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import matrix_script
import pytest
import torch
from base_matrix import ATTACHED, BASES, CELLS, EVERY, QUICK, REASONS, REFUSED
from launch import run_script
from modules import assert_same, trainer
from torch import Tensor

from lightning_peft.core.method import registered_methods

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)

# Float32 sums in another order, over six steps of values of up to 2.6.
BOUND = 2e-6
LOSS = 1e-5


def cells(served: bool) -> list[Any]:
    return [
        pytest.param(*cell, marks=() if cell in QUICK else pytest.mark.slow)
        for cell in EVERY
        if (cell not in REFUSED) == served
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matrix")


@cache
def alone(folder: Path, cell: str) -> dict[str, Any]:
    """What one process saw."""
    return matrix_script.alone(folder / "alone" / matrix_script.folder_of(cell), cell)


@cache
def launched(folder: Path, start: str) -> list[dict[str, Any]]:
    """What each of two processes saw that went through the quick cells, or through all others of a base."""
    chosen = QUICK if start == "quick" else [cell for cell in EVERY if cell[0] == start and cell not in QUICK]
    for cell in dict.fromkeys(cell for _, cell in chosen):
        alone(folder, cell)
    out = folder / start
    out.mkdir()
    run_script(matrix_script.__file__, out, folder / "alone", json.dumps(chosen), timeout=580)
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def seen(folder: Path, base: str, cell: str) -> list[Any]:
    return [rank[f"{base}: {cell}"] for rank in launched(folder, "quick" if (base, cell) in QUICK else base)]


def assert_near(left: dict[str, Tensor], right: dict[str, Tensor], what: str) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert (left[name].float() - right[name].float()).abs().max() <= BOUND, (what, name)


def saved(directory: Path) -> dict[str, dict[str, Tensor]]:
    """Read with one process what was left to go on from."""
    content = trainer(directory).strategy.load_checkpoint(directory / "stopped" / "directories" / "last")
    (optimizer,) = content["optimizer_states"]
    momenta = {name: entry["momentum_buffer"] for name, entry in optimizer["state"].items() if entry}
    return {"state": content["state_dict"], "momenta": momenta}


@pytest.mark.parametrize(("base", "cell"), cells(served=True))
def test_two_processes_do_what_one_does(base: str, cell: str, folder: Path) -> None:
    ranks, expected = seen(folder, base, cell), alone(folder, cell)
    for rank in ranks:
        assert isinstance(rank, dict), rank
        assert_near(rank["two"], expected["two"], "trained")
        assert_same(rank["evaluated"], rank["two"])
        assert rank["losses"] == pytest.approx([expected["loss"]] * 5, abs=LOSS)
        assert rank["merged"] == (expected["merged"] and (base, cell) not in ATTACHED)
        assert rank["base is not back"] == []
        for start in ("directory", "file", "one"):
            assert_near(rank[start], expected["three"], f"resumed from {start}")
    start = "quick" if (base, cell) in QUICK else base
    left, right = (saved(folder / below / matrix_script.folder_of(cell)) for below in (f"{start}/{base}", "alone"))
    for what in left:
        assert_near(left[what], right[what], what)


@pytest.mark.parametrize(("base", "cell"), cells(served=False))
def test_what_is_refused_says_why(base: str, cell: str, folder: Path) -> None:
    for message in seen(folder, base, cell):
        assert "PEFTError" in message
        assert re.search(REASONS[REFUSED[base, cell]], message), message


@pytest.mark.parametrize("cell", CELLS)
def test_training_went_on(cell: str, folder: Path) -> None:
    run = alone(folder, cell)
    assert max((run["three"][name] - value).abs().max() for name, value in run["two"].items()) > 100 * BOUND


def test_every_method_is_in_it() -> None:
    ours = {cls for cls in registered_methods().values() if cls.__module__.startswith("lightning_peft.methods.")}
    given = [methods if isinstance(methods, list) else [methods] for _, methods, _ in CELLS.values()]
    assert {type(method) for methods in given for method in methods} == ours


def test_the_quick_part_has_every_row_and_column() -> None:
    assert {base for base, _ in QUICK} == set(BASES)
    assert {cell for _, cell in QUICK} == set(CELLS)
