"""Two real processes, started by Lightning's two launchers, against one process on the same global batches."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ddp_script
import pytest
import torch
from modules import Regression, assert_same, by_hand, inputs, trainer

from lightning_peft import load_adapter

NAMES = {f"net.{layer}.peft.default.lora_{which}" for layer in (0, 2) for which in "AB"}


@pytest.fixture(scope="module", params=["ddp", "ddp_spawn"])
def out(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "MASTER_PORT", "WORLD_SIZE")}
    result = subprocess.run(
        [sys.executable, ddp_script.__file__, request.param, str(path)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return path


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single")
    ddp_script.run(path, "two", "auto", 1, 2)
    ddp_script.run(path, "three", "auto", 1, 3)
    return path


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def checkpoint(path: Path) -> dict[str, Any]:
    return trainer(path.parent).strategy.load_checkpoint(path, weights_only=True)


@pytest.mark.parametrize("tag", ["two", "three"])
def test_ranks_are_equal(out: Path, tag: str) -> None:
    first, second = load(out / f"{tag}-rank0.pt"), load(out / f"{tag}-rank1.pt")
    assert_same(first["adapters"], second["adapters"])
    assert torch.equal(first["outputs"], second["outputs"])
    assert first["merged"]
    assert second["merged"]


@pytest.mark.parametrize("tag", ["two", "three"])
def test_two_processes_learn_what_one_does(out: Path, single: Path, tag: str) -> None:
    """``three`` was resumed from ``two`` there, and trained without a break here."""
    ours, judge = load(out / f"{tag}-rank0.pt"), load(single / f"{tag}-rank0.pt")
    assert ours["adapters"].keys() == judge["adapters"].keys() == NAMES
    for name, value in judge["adapters"].items():
        torch.testing.assert_close(ours["adapters"][name], value, rtol=0, atol=1e-6)
        assert value.any()


def test_resuming_went_on(out: Path) -> None:
    two, three = load(out / "two-rank0.pt"), load(out / "three-rank0.pt")
    assert not torch.equal(two["outputs"], three["outputs"])
    assert checkpoint(out / "three-directories" / "last")["global_step"] == 6


@pytest.mark.parametrize("tag", ["two", "three"])
def test_the_main_process_ends_with_the_workers_model(out: Path, tag: str) -> None:
    worker, main = load(out / f"{tag}-rank0.pt"), load(out / f"{tag}-main.pt")
    assert main["merged"]
    assert_same(main["adapters"], worker["adapters"])
    torch.testing.assert_close(main["outputs"], worker["outputs"], rtol=0, atol=1e-6)
    torch.testing.assert_close(main["outputs"], by_hand(worker["adapters"], inputs()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["files/last.ckpt", "directories/last"])
@pytest.mark.parametrize("tag", ["two", "three"])
def test_checkpoints_hold_adapter_state_only(out: Path, tag: str, kind: str) -> None:
    saved = checkpoint(out / f"{tag}-{kind}")
    assert_same(saved["state_dict"], load(out / f"{tag}-rank0.pt")["adapters"])
    assert set(saved["optimizer_states"][0]["state"]) == NAMES


def test_one_process_reads_what_two_wrote(out: Path) -> None:
    module = Regression()
    load_adapter(module, out / "two-directories" / "last")
    expected = load(out / "two-rank0.pt")["outputs"]
    torch.testing.assert_close(module(inputs()), expected, rtol=1e-5, atol=1e-5)
