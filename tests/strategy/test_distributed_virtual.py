"""Virtual tokens in two processes, against one process on the same global batches."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import virtual_script
from launch import run_script
from modules import Llama, assert_same
from virtual_script import METHODS

from lightning_peft import load_adapter

QUICK = ("ddp", "fsdp")

# Float32 sums in another order.
BOUND = 1e-6


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single")
    for name in METHODS:
        virtual_script.run(path, name, "auto", 1)
        virtual_script.run(path, name, "auto", 2)
    return path


@cache
def started(bases: tuple[str, ...], path: Path) -> Path:
    """What two processes left that went through ``bases`` one after the other."""
    run_script(virtual_script.__file__, ",".join(bases), path)
    return path


@pytest.fixture(scope="module", params=[*QUICK, pytest.param("fsdp2", marks=pytest.mark.slow)])
def out(request: pytest.FixtureRequest, single: Path) -> Path:
    return started(QUICK if request.param in QUICK else (request.param,), single) / str(request.param)


def skip_refused(out: Path, name: str) -> None:
    """Skip what the script was refused, after a look at the reason."""
    refused = out / f"{name}-refused.txt"
    if refused.exists():
        assert name == "mlp"
        assert "in shards, and cannot be folded" in refused.read_text()
        pytest.skip("the MLP cannot be folded where it is in shards")


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_learn_what_one_does(out: Path, single: Path, name: str) -> None:
    skip_refused(out, name)
    for ours, theirs in (("1", "1"), ("resumed", "2")):
        ranks = [load(out / f"{name}-{ours}-rank{rank}.pt") for rank in (0, 1)]
        alone = load(single / f"{name}-{theirs}-rank0.pt")
        assert_same(ranks[0]["adapters"], ranks[1]["adapters"])
        assert ranks[0]["adapters"].keys() == alone["adapters"].keys()
        for key, value in alone["adapters"].items():
            assert (ranks[0]["adapters"][key] - value).abs().max() <= BOUND, key
        for rank in ranks:
            assert (rank["logits"] - alone["logits"]).abs().max() <= BOUND
    first, last = (load(single / f"{name}-{epochs}-rank0.pt")["adapters"] for epochs in (1, 2))
    assert all((last[key] - first[key]).abs().max() > 1e-5 for key in first)


@pytest.mark.parametrize("name", METHODS)
def test_one_process_reads_what_two_wrote(out: Path, name: str) -> None:
    skip_refused(out, name)
    module = Llama()
    load_adapter(module, out / f"{name}-resumed" / "last")
    logits = module.model(input_ids=torch.arange(6)[None]).logits
    assert (logits - load(out / f"{name}-resumed-rank0.pt")["logits"]).abs().max() <= BOUND
