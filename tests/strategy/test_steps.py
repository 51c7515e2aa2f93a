"""Steps on two processes against one: whole parameters beside others in pieces, clipping, gradients that hooks see."""

import importlib.util
import re
from typing import Any

import pytest
import steps_script
import torch
from launch import run_script

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)

# Float32 sums in another order; measured 6e-8.
BOUND = 5e-7
EVERY = [(base, case) for base in steps_script.BASES for case in steps_script.CASES if steps_script.serves(base, case)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("alone")
    return {case: steps_script.run(out, "auto", case) for case in steps_script.CASES}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("steps")
    run_script(steps_script.__file__, out)
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize(("base", "case"), [cell for cell in EVERY if cell not in steps_script.REFUSED])
def test_two_processes_step_as_one_does(base: str, case: str, ranks: list[Any], alone: dict[str, Any]) -> None:
    expected = alone[case]
    for rank in ranks:
        seen = rank[base][case]
        assert "error" not in seen, seen
        assert seen["trained"].keys() == expected["trained"].keys()
        for name, value in expected["trained"].items():
            assert (seen["trained"][name] - value).abs().max() <= BOUND, name
        assert seen["norms"] == pytest.approx(expected["norms"], rel=1e-5)
        if seen["groups"]:
            assert seen["groups"] == expected["groups"]


@pytest.mark.parametrize(("base", "case"), sorted(steps_script.REFUSED))
def test_what_is_refused_says_why(base: str, case: str, ranks: list[Any]) -> None:
    for rank in ranks:
        assert re.search(steps_script.REFUSED[base, case], rank[base][case]["error"])


def test_clipping_matters(alone: dict[str, Any]) -> None:
    assert alone["beside norms counted"]["groups"] == [{"lr": pytest.approx(0.9 * 0.05 / 6), "count": 6}]
    assert min(alone["clipped in a hook"]["norms"]) > 2 * steps_script.LIMIT
