"""Weights that are read without a call, or shared: two processes on every base that cuts up, against one process."""

import importlib.util
from typing import Any

import hosts_script
import pytest
import torch
from launch import run_script
from torch import Tensor

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)

# Float32 sums in another order, over six steps of values around 0.5.
BOUND = 2e-6
SERVED = [(base, cell) for base in hosts_script.BASES for cell in hosts_script.CELLS]
SERVED = [found for found in SERVED if found not in hosts_script.REFUSED]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    out = tmp_path_factory.mktemp("alone")
    return {cell: hosts_script.run(out, "auto", cell) for cell in hosts_script.CELLS}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    out = tmp_path_factory.mktemp("hosts")
    run_script(hosts_script.__file__, out, timeout=500)
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def assert_near(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert (left[name] - right[name]).abs().max() <= BOUND, name


@pytest.mark.parametrize(("base", "cell"), SERVED)
def test_two_processes_do_what_one_does(base: str, cell: str, ranks: list[Any], alone: dict[str, Any]) -> None:
    expected = alone[cell]
    for rank in ranks:
        seen = rank[base][cell]
        assert seen["merged"] == expected["merged"]
        assert seen["base is back"]
        for what in ("adapters", "directories", "files"):
            assert_near(seen[what], expected[what])


@pytest.mark.parametrize(("base", "cell"), SERVED)
def test_evaluation_gives_what_fit_ended_with(base: str, cell: str, ranks: list[Any], alone: dict[str, Any]) -> None:
    for rank in ranks:
        assert rank[base][cell]["losses"] == pytest.approx([alone[cell]["losses"][0]] * 3, abs=5 * BOUND)


def test_training_went_on(alone: dict[str, Any]) -> None:
    for cell, seen in alone.items():
        moved = [(seen["files"][n] - value).abs().max() for n, value in seen["adapters"].items()]
        assert max(moved) > 1e-3, cell


@pytest.mark.parametrize(("base", "cell"), sorted(hosts_script.REFUSED))
def test_what_is_refused_says_why(base: str, cell: str, ranks: list[Any]) -> None:
    for rank in ranks:
        assert "adapters on them would be trained too late" in rank[base][cell]
