"""Gradients of several batches: two processes add them up as one does, and a checkpoint in the middle holds them."""

import importlib.util
from pathlib import Path
from typing import Any

import accumulation_script
import pytest
import steps_script
import torch
from launch import run_script

from lightning_peft import PEFTError

# Float32 sums in another order; measured 6e-8.
BOUND = 5e-7
BASES = [base for base in steps_script.BASES if not base.startswith("stage")]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("single")


@pytest.fixture(scope="module")
def alone(single: Path) -> dict[str, Any]:
    return accumulation_script.run(single, "auto")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, single: Path, alone: Any) -> list[dict[str, Any]]:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    out = tmp_path_factory.mktemp("two")
    run_script(accumulation_script.__file__, out, single)
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def difference(seen: dict[str, Any], expected: dict[str, Any]) -> float:
    assert seen["trained"].keys() == expected["trained"].keys()
    return max(float((seen["trained"][name] - value).abs().max()) for name, value in expected["trained"].items())


@pytest.mark.parametrize("name", accumulation_script.FILES)
def test_one_process_goes_on_exactly(name: str, single: Path, alone: dict[str, Any]) -> None:
    assert difference(accumulation_script.run(single, "auto", single / name), alone) == 0


@pytest.mark.parametrize("base", steps_script.BASES)
def test_two_processes_accumulate_as_one_does(base: str, ranks: list[Any], alone: dict[str, Any]) -> None:
    for rank in ranks:
        assert difference(rank[base]["uninterrupted"], alone) <= BOUND


@pytest.mark.parametrize("base", BASES)
def test_two_processes_go_on_exactly(base: str, ranks: list[Any], alone: dict[str, Any]) -> None:
    for rank in ranks:
        seen = rank[base]
        for name in accumulation_script.FILES:
            assert difference(seen[name], seen["uninterrupted"]) == 0
            assert difference(seen[f"one {name}"], alone) <= BOUND


def test_deepspeed_says_that_it_keeps_them(ranks: list[Any]) -> None:
    said = {base: " ".join(ranks[0][base]["uninterrupted"]["said"]) for base in ranks[0]}
    assert [base for base in said if "in the middle of an accumulation" in said[base]] == ["stage2", "stage3"]


def test_other_parameters_are_refused(single: Path, alone: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = torch.load(single / "middle.ckpt", weights_only=True)
    gradients = checkpoint["lightning_peft"]["gradients"]
    gradients["net.9.peft.default.lora_A"] = gradients.pop("net.0.peft.default.lora_A")
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.raises(PEFTError, match=r"accumulated gradient of 'net\.9\.peft\.default\.lora_A'.*Make those"):
        accumulation_script.run(tmp_path, "auto", tmp_path / "other.ckpt")
    checkpoint["lightning_peft"]["gradients"] = [1]
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.raises(PEFTError, match="accumulated gradients are damaged"):
        accumulation_script.run(tmp_path, "auto", tmp_path / "other.ckpt")
