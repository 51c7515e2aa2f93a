"""Two nodes with a network between them, started by torchrun and by Lightning, against one process."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import network
import pytest
import torch
from cluster import config, model_and_data, run_alone
from network import Node, two_nodes, wait_for
from safetensors import safe_open

pytestmark = pytest.mark.skipif(bool(reason := network.why_not()), reason=str(reason))

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "launch" / "torchrun.sh"


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[Node, Node]]:
    with two_nodes() as pair:
        yield pair


@pytest.fixture
def idle(nodes: tuple[Node, Node]) -> Iterator[tuple[Node, Node]]:
    """The nodes, on which nothing runs before the test nor after it."""
    yield nodes
    for node in nodes:
        node.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shared")
    model_and_data(path)
    return path


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, torch.Tensor]:
    """The adapters of one process that saw the same global batches, without a break."""
    run_alone(config(folder, nodes=1, batch=8, out=folder / "alone"))
    return adapters(folder / "alone", 0)


def adapters(out: Path, rank: int) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(out / f"rank{rank}.pt", weights_only=True)
    return state


def torchrun(node: Node, host: Node, run: Path) -> Any:
    """Start the script that users are given; ``host`` keeps the rendezvous."""
    environment = {
        "HEAD": f"{host.address}:29400",
        "GPUS": "1",
        "CONFIG": str(run),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        # What torchrun finds out by the names of machines, which these nodes have in common; and sooner than after 15
        # seconds that a node is gone.
        "PET_LOCAL_ADDR": node.address,
        "PET_RDZV_CONF": f"is_host={int(node is host)},keep_alive_interval=1",
    }
    return node.start([str(SCRIPT)], run.with_suffix(f".{node.name}.log"), **environment)


def lightning(node: Node, host: Node, rank: int, run: Path, *arguments: str) -> Any:
    """Start the command on ``node`` without a launcher."""
    environment = {"MASTER_ADDR": host.address, "MASTER_PORT": "29500", "NODE_RANK": str(rank)}
    command = [sys.executable, "-m", "lightning_peft", "fit", f"--config={run}", *arguments]
    return node.start(command, run.with_suffix(f".{node.name}.log"), **environment)


def finish(processes: list[Any], out: Path, expect: int = 0) -> str:
    """Wait for the processes and return what they printed."""
    codes = [process.wait(timeout=180) for process in processes]
    printed = "".join(file.read_text(errors="replace") for file in sorted(out.glob("*.log")))
    assert codes == [expect] * len(codes), printed[-6000:]
    return printed


def assert_trained_as_one(out: Path, alone: dict[str, torch.Tensor]) -> None:
    first, second = adapters(out, 0), adapters(out, 1)
    assert first.keys() == second.keys() == alone.keys()
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        # The mean of two processes' gradients is rounded in another order than the gradient of one batch.
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-6)
        assert value.any()


def assert_one_adapter_only_checkpoint(out: Path, names: set[str]) -> None:
    assert os.listdir(out / "checkpoints") == ["last"]
    with safe_open(out / "checkpoints" / "last" / "adapter_model.safetensors", "pt") as file:
        saved = {name.removeprefix("base_model.model.") for name in file.keys()}  # noqa: SIM118 (no dict)
    expected = {name.removeprefix("model.").replace(".peft.default.lora_", ".lora_") + ".weight" for name in names}
    assert saved == expected
    state = torch.load(out / "checkpoints" / "last" / "trainer_state.ckpt", weights_only=True)
    assert state["global_step"] == 4
    assert "state_dict" not in state
    # Rank 1 writes its record and nothing else.
    assert {file.name for file in out.iterdir() if file.suffix == ".pt"} == {"rank0.pt", "rank1.pt"}


def test_torchrun(idle: tuple[Node, Node], folder: Path, alone: dict[str, torch.Tensor]) -> None:
    first, second = idle
    run = config(folder, nodes=2, batch=4, out=folder / "torchrun")
    finish([torchrun(node, first, run) for node in (first, second)], run.parent)
    assert_trained_as_one(run.parent, alone)
    assert_one_adapter_only_checkpoint(run.parent, set(alone))


def test_lightning_without_a_launcher(idle: tuple[Node, Node], folder: Path, alone: dict[str, torch.Tensor]) -> None:
    first, second = idle
    run = config(folder, nodes=2, batch=4, out=folder / "lightning")
    finish([lightning(node, first, rank, run) for rank, node in enumerate((first, second))], run.parent)
    assert_trained_as_one(run.parent, alone)
    assert_one_adapter_only_checkpoint(run.parent, set(alone))


def test_a_node_is_lost_and_replaced(idle: tuple[Node, Node], folder: Path, alone: dict[str, torch.Tensor]) -> None:
    """The survivor's torchrun restarts its worker when the node is back; both resume from the checkpoint of step 2.

    The command is the same on the first start, when there is no checkpoint yet.
    """
    first, second = idle
    run = config(folder, nodes=2, batch=4, out=folder / "lost", hold=3)
    survivor, _ = (torchrun(node, first, run) for node in (first, second))
    wait_for(lambda: all((run.parent / f"waits{rank}").exists() for rank in (0, 1)), "step 3 on both nodes")
    second.kill()
    (run.parent / "go").touch()
    printed = finish([survivor, torchrun(second, first, run)], run.parent)
    assert "there is no last checkpoint available" in printed
    assert f"Restored all states from the checkpoint at {run.parent / 'checkpoints' / 'last'}" in printed
    assert_trained_as_one(run.parent, alone)
    assert_one_adapter_only_checkpoint(run.parent, set(alone))
    undisturbed = adapters(folder / "torchrun", 0)
    assert all(torch.equal(value, undisturbed[name]) for name, value in adapters(run.parent, 0).items())


@pytest.mark.slow
@pytest.mark.parametrize("other", ["none", "older"])
def test_nodes_that_do_not_share_their_checkpoints(idle: tuple[Node, Node], folder: Path, other: str) -> None:
    """One finds a checkpoint and the other none, or an older one: that ends at once, with the reason."""
    first, second = idle
    here = config(folder, nodes=2, batch=4, out=folder / f"{other} here")
    there = config(folder, nodes=2, batch=4, out=folder / f"{other} there")
    run_alone(here, "--trainer.num_nodes=1")
    if other == "older":
        run_alone(there, "--trainer.num_nodes=1", "--trainer.max_steps=2")
    runs = [(first, here), (second, there)]
    processes = [lightning(node, first, rank, run, "--ckpt_path=last") for rank, (node, run) in enumerate(runs)]
    printed = finish(processes, here.parent, expect=1) + finish(processes, there.parent, expect=1)
    found = {"none": r"found, by rank: \[1, 0\]", "older": r"of step, by rank: \[4, 2\]"}[other]
    message = f"error: The processes would not resume from one checkpoint. Checkpoints {found}"
    assert len(re.findall(message, printed)) == 2
