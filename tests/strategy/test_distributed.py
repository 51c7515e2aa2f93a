"""Real processes on every base strategy that runs on CPUs, against one process on the same global batches."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import distributed_script
import pytest
import refusals_script
import torch
from launch import run_script
from modules import Regression, assert_same, by_hand, inputs, loader, trainer

from lightning_peft import PEFTError, PEFTStrategy, load_adapter

NAMES = {f"net.{layer}.peft.default.lora_{which}" for layer in (0, 2) for which in "AB"}
BASES = [base for base in distributed_script.BASES if base != "auto"]
RUNS = {"two": "two", "three": "three", "file": "three", "one": "three"}
"""Each run with the run in one process that it has to equal."""
VALUES = 2 * (8 + 16) + 2 * (16 + 4)

# Float32 sums in another order, over six steps of values around 0.5: measured 3e-8 on every base.
BOUND = 1e-6


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single")
    distributed_script.run(path, "two", "auto", 1, 2)
    distributed_script.run(path, "three", "auto", 1, 3)
    distributed_script.trained_whole(path, "auto", 1)
    return path


@pytest.fixture(scope="module", params=BASES)
def base(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@cache
def started(bases: tuple[str, ...], single: Path) -> Path:
    """What processes left that went through ``bases`` one after the other, each in a folder of its name."""
    out = single.with_name(f"{single.name}-{bases[0]}")
    out.mkdir()
    run_script(distributed_script.__file__, ",".join(bases), out, single)
    return out


@pytest.fixture(scope="module")
def out(base: str, single: Path) -> Path:
    return started(next(bases for bases in distributed_script.STARTS if base in bases), single) / base


@pytest.fixture
def runs_once(base: str) -> None:
    if base in distributed_script.STARTED_HERE:
        pytest.skip("Lightning allows one run per process that spawns")


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def checkpoint(path: Path) -> dict[str, Any]:
    """Read in one process what several wrote; shards are read where they are not written if they are trusted."""
    return trainer(path.parent).strategy.load_checkpoint(path, weights_only=not (path / "meta.pt").exists())


@pytest.fixture(params=RUNS)
def tag(request: pytest.FixtureRequest, base: str) -> str:
    if base == "ddp_spawn" and request.param in ("file", "one"):
        pytest.skip("as with ddp_fork: the workers differ in how they start")
    return str(request.param)


def test_ranks_are_equal_and_merged(out: Path, tag: str) -> None:
    ranks = [load(file) for file in sorted(out.glob(f"{tag}-rank*.pt"))]
    assert len(ranks) > 1
    for rank in ranks:
        assert_same(rank["adapters"], ranks[0]["adapters"])
        assert torch.equal(rank["outputs"], ranks[0]["outputs"])
        assert rank["merged"]


def test_many_processes_learn_what_one_does(out: Path, single: Path, tag: str) -> None:
    # "three" and "file" went on from a directory and a file of this base, "one" from those of one process.
    alone, together = load(single / f"{RUNS[tag]}-rank0.pt"), load(out / f"{tag}-rank0.pt")
    assert alone["adapters"].keys() == together["adapters"].keys() == NAMES
    for name, value in alone["adapters"].items():
        assert (together["adapters"][name] - value).abs().max() <= BOUND, name
    assert (together["outputs"] - by_hand(together["adapters"], inputs())).abs().max() <= BOUND


def test_training_moved_the_adapters(single: Path) -> None:
    two, three = load(single / "two-rank0.pt")["adapters"], load(single / "three-rank0.pt")["adapters"]
    assert max(float((two[name] - three[name]).abs().max()) for name in NAMES) > 1e-2


@pytest.mark.parametrize("kind", ["files/last.ckpt", "directories/last"])
@pytest.mark.parametrize("tag", ["two", "three"])
def test_checkpoints_hold_adapter_state_only(out: Path, tag: str, kind: str) -> None:
    saved = checkpoint(out / f"{tag}-{kind}")
    assert_same(saved["state_dict"], load(out / f"{tag}-rank0.pt")["adapters"])
    (state,) = saved["optimizer_states"]
    assert set(state["state"]) == NAMES
    assert all(s["momentum_buffer"].shape == saved["state_dict"][n].shape for n, s in state["state"].items())


def test_checkpoints_are_in_lightnings_layout(out: Path, base: str) -> None:
    file = out / "two-files" / "last.ckpt"
    if base.endswith("shards"):
        assert {"meta.pt", ".metadata"} <= {part.name for part in file.iterdir()}
    else:
        assert file.is_file()


def test_optimizer_state_is_that_of_adapters(out: Path, base: str) -> None:
    counts = [int(file.read_text()) for file in sorted(out.glob("two-state*.txt"))]
    if base in ("fsdp2", "fsdp2_shards"):
        assert sum(counts) == VALUES  # each process has its shard
    elif base.startswith("tensor"):
        assert VALUES < sum(counts) < 2 * VALUES  # what faces a whole feature dimension is on both
    elif base == "both":
        assert VALUES < sum(counts) < 4 * VALUES
    elif base not in distributed_script.STARTED_HERE:  # its optimizers stay in the workers
        assert counts == [VALUES, VALUES]


def test_one_process_reads_what_many_wrote(out: Path) -> None:
    module = Regression()
    load_adapter(module, out / "two-directories" / "last")
    torch.testing.assert_close(module(inputs()), load(out / "two-rank0.pt")["outputs"], rtol=0, atol=BOUND)


def test_one_process_goes_on_from_what_many_wrote(out: Path, base: str, single: Path) -> None:
    for number, kind in enumerate(["files/last.ckpt", "directories/last"]):
        weights_only = not (base.endswith("shards") and number == 0)
        distributed_script.run(out, f"alone{number}", "auto", 1, 3, out / f"two-{kind}", weights_only)
        alone, three = load(out / f"alone{number}-rank0.pt"), load(single / "three-rank0.pt")
        for name in NAMES:
            assert (alone["adapters"][name] - three["adapters"][name]).abs().max() <= BOUND


@pytest.mark.usefixtures("runs_once")
def test_the_module_is_ready_to_use_after_fit(out: Path) -> None:
    losses, first = load(out / "on.pt"), checkpoint(out / "on-directories" / "epoch=0")["state_dict"]
    last = load(out / "two-rank0.pt")["adapters"]
    for what, adapters in (("merged", last), ("first", first)):
        expected = (by_hand(adapters, inputs()) - inputs()[:, :4]).square().mean()
        assert losses[what] == pytest.approx(float(expected), abs=BOUND)
    assert losses["first"] > losses["merged"] + 1e-3
    assert_same(load(out / "on-rank0.pt")["adapters"], load(out / "three-rank0.pt")["adapters"])


@pytest.mark.usefixtures("runs_once")
def test_evaluation_without_training(out: Path) -> None:
    content, outputs = load(out / "evaluate.pt"), by_hand(load(out / "two-rank0.pt")["adapters"], inputs())
    assert content["loss"] == pytest.approx(float((outputs - inputs()[:, :4]).square().mean()), abs=BOUND)
    torch.testing.assert_close(content["outputs"], outputs, rtol=0, atol=BOUND)


@pytest.mark.usefixtures("runs_once")
def test_a_module_trained_whole(out: Path, single: Path) -> None:
    alone = load(single / "whole-rank0.pt")["outputs"]
    for file in out.glob("whole-rank*.pt"):
        torch.testing.assert_close(load(file)["outputs"], alone, rtol=0, atol=BOUND)
    ours, theirs = (checkpoint(path / "whole-directories" / "last")["state_dict"] for path in (out, single))
    assert ours.keys() == theirs.keys() >= {"net.2.weight", "net.2.bias"}
    for name, value in theirs.items():
        assert (ours[name] - value).abs().max() <= BOUND, name


@pytest.mark.usefixtures("runs_once")
def test_full_checkpoints(out: Path, base: str) -> None:
    if base in distributed_script.NO_FULL_STATE:
        pytest.skip("torch's FSDP1 cannot gather a whole model on CPUs")
    three = load(out / "three-rank0.pt")
    resumed = load(out / "full3-rank0.pt")
    assert_same(resumed["adapters"], three["adapters"])
    torch.testing.assert_close(resumed["outputs"], three["outputs"], rtol=0, atol=BOUND)
    outputs = by_hand(load(out / "two-rank0.pt")["adapters"], inputs())
    expected = (outputs - inputs()[:, :4]).square().mean()
    assert load(out / "full.pt")["loss"] == pytest.approx(float(expected), abs=BOUND)
    if not base.endswith("shards"):
        state = torch.load(out / "full-files" / "last.ckpt", weights_only=True)["state_dict"]
        stock = Regression()
        stock.load_state_dict({name: tensor for name, tensor in state.items() if name not in NAMES})
        assert_same(stock.state_dict(), Regression().state_dict())


def test_the_main_process_of_a_spawn_ends_with_the_workers_model(base: str, out: Path) -> None:
    if base not in ("ddp", *distributed_script.STARTED_HERE):
        pytest.skip("the main process is itself a worker")
    main, worker = load(out / "two-main.pt"), load(out / "two-rank0.pt")
    assert_same(main["adapters"], worker["adapters"])
    assert torch.equal(main["outputs"], worker["outputs"])
    assert main["merged"]


@pytest.fixture(scope="module")
def messages(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    path = tmp_path_factory.mktemp("refusals")
    run_script(refusals_script.__file__, path)
    return [json.loads((path / f"messages-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize(
    ("case", "pattern"),
    [
        ("differing", "1 processes have other adapters than rank 0"),
        ("tied", "'net.0' is adapted and shares its weight with another module"),
        *((f"rank-{base}", r"r=2 \(here 3\)") for base in ("ddp", "fsdp", "fsdp2")),
        *((f"targets-{base}", r"Superfluous: net\.2\.peft") for base in ("ddp", "fsdp", "fsdp2")),
    ],
)
def test_every_process_refuses(messages: list[dict[str, str]], case: str, pattern: str) -> None:
    for rank in messages:
        assert re.search(pattern, rank[case])


def test_a_differing_rank_says_what_differs(messages: list[dict[str, str]]) -> None:
    assert "here 'net.0.peft.default.lora_B' is [24, 2], on rank 0 [16, 2]" in messages[1]["differing"]


def test_fsdp_on_a_cpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PEFTError, match="FSDP needs GPUs"):
        trainer(tmp_path, PEFTStrategy(base="fsdp"), devices=1).fit(Regression(), loader())
