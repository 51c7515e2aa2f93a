"""A plain module is left behind on every base strategy, by two real processes."""

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import leaving_script
import pytest
import torch
from distributed_script import NO_FULL_STATE
from launch import run_script
from modules import Regression, by_hand, inputs

# One start of processes each.
STARTS = [("ddp", "fsdp", "fsdp2", "tensor"), ("ddp_fork",)]
if importlib.util.find_spec("deepspeed") is not None:
    STARTS.append(("deepspeed1", "deepspeed3"))
BASES = [base for bases in STARTS for base in bases]
KEYS = list(Regression().state_dict())
# Float32 sums in another order.
BOUND = 1e-5


@cache
def started(bases: tuple[str, ...], root: Path) -> Path:
    run_script(leaving_script.__file__, ",".join(bases), root)
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("leaving")


@pytest.fixture(params=BASES)
def out(request: pytest.FixtureRequest, root: Path) -> Path:
    base = request.param
    return started(next(bases for bases in STARTS if base in bases), root) / base


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def test_every_process_is_left_with_a_plain_module(out: Path) -> None:
    # Which `load_from_checkpoint` reads in one process, and gives as a plain module too.
    checkpoint = out / "epoch=1.ckpt"
    reloaded = None if checkpoint.is_dir() else Regression.load_from_checkpoint(checkpoint)
    found = sorted([*out.glob("fit-*.pt"), *out.glob("tested-*.pt"), *out.glob("main-*.pt")])
    assert len(found) == (3 if out.name == "ddp_fork" else 4)
    expected = load(found[0])["outputs"]
    for content in map(load, found):
        assert content["names"] == KEYS
        assert not content["adapted"]
        assert (content["outputs"] - expected).abs().max() < BOUND
    assert (expected - Regression()(inputs())).abs().max() > 0.1
    if reloaded is not None:
        assert list(reloaded.state_dict()) == KEYS
        assert (reloaded(inputs()) - expected).abs().max() < BOUND
        state = load(checkpoint)["state_dict"]
        assert (by_hand(state, inputs()) - expected).abs().max() < BOUND


def test_what_it_can_be_used_for(out: Path) -> None:
    if out.name == "ddp_fork":
        pytest.skip("Lightning allows one run per process that spawns")
    first, second = (load(out / f"messages-{rank}.pt") for rank in (0, 1))
    assert first == second or out.name == "fsdp"  # whose weights nobody has whole, so that distances differ
    assert "the base is gone" in first["best"]
    if out.name == "deepspeed3":
        assert "cannot be saved" in first["save"]
    elif out.name not in NO_FULL_STATE:
        saved = load(out / "after.ckpt")["state_dict"]
        module = Regression()
        module.load_state_dict(saved)
        assert (module(inputs()) - load(out / "fit-0.pt")["outputs"]).abs().max() < BOUND
    if out.name == "fsdp":
        assert "in shards, to which no adapters can be added" in first["again"]
    else:
        assert not first["again"]
        twice = load(out / "again-0.pt")
        assert twice["names"] == KEYS
        assert (twice["outputs"] - load(out / "fit-0.pt")["outputs"]).abs().max() > 0.1
    assert bool(first["full"]) == (out.name != "ddp")
