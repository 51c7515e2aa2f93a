"""Adapters beside layers that tensor parallelism has split, on two processes against one, and by hand."""

import re
from pathlib import Path
from typing import Any

import pytest
import tensor_script
import torch
from launch import run_script
from modules import assert_same
from torch import Tensor

# Float32 sums in another order, over eight steps.
BOUND = 1e-6


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tensor")
    run_script(tensor_script.__file__, out)
    return out


@pytest.fixture(scope="module")
def ranks(out: Path) -> list[dict[Any, Any]]:
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize(("plan", "case"), [cell for cell in tensor_script.CASES if cell not in tensor_script.REFUSED])
def test_split_layers_learn_what_whole_ones_do(plan: str, case: str, ranks: list[Any], tmp_path: Path) -> None:
    alone: dict[str, Tensor] = tensor_script.run(tmp_path, None, tensor_script.CASES[plan, case])["trained"]
    for rank in ranks:
        seen = rank[plan, case]
        assert seen["trained"].keys() == alone.keys()
        assert max((seen["trained"][name] - value).abs().max() for name, value in alone.items()) <= BOUND
        assert seen["changed"] == []


@pytest.mark.parametrize("cell", tensor_script.REFUSED)
def test_what_is_refused_says_why_each_time(cell: tuple[str, str], ranks: list[Any]) -> None:
    for rank in ranks:
        first, second = rank[cell]
        assert re.search(tensor_script.REFUSED[cell], first), first
        assert second == first


def test_by_hand(ranks: list[Any]) -> None:
    for rank in ranks:
        seen = rank["by hand"]
        assert seen["in pieces"]
        for when in ("loaded", "in the end"):
            assert_same(seen[when], seen["trained"])
        assert "There is no adapter 'other'. Adapters: default." in seen["unknown"]
        assert "is already sharded" in seen["injected"]
        assert "beside layers that parallelize_module has split" in seen["injected"]
