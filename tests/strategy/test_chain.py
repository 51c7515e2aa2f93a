"""A run that goes on from base to base, and from one number of processes to another, is one process's run."""

import importlib.util
from pathlib import Path
from typing import Any

import chain_script
import pytest
import torch
from launch import run_script
from modules import trainer
from torch import Tensor

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)

# Float32 sums in another order, over steps of AdamW.
BOUND = 1e-6
CHAINS: dict[str, list[tuple[str, int]]] = {
    "from shards to shards": [("fsdp2", 2), ("stage3", 3), ("ddp", 2), ("tensor", 2), ("fsdp", 3), ("stage2", 2)],
    "on four processes": [("stage1", 3), ("both", 4), ("fsdp2_late", 3), ("stage3", 4), ("fsdp2", 3), ("auto", 1)],
}


def saved(directory: Path) -> dict[str, dict[str, Tensor]]:
    """Read with one process what was left to go on from: values, moments, and counted steps."""
    content = trainer(directory).strategy.load_checkpoint(directory / "last")
    (optimizer,) = content["optimizer_states"]
    found: dict[str, dict[str, Tensor]] = {"state": content["state_dict"]}
    for what in ("exp_avg", "exp_avg_sq", "step"):
        found[what] = {name: torch.as_tensor(entry[what]) for name, entry in optimizer["state"].items() if entry}
    return found


def assert_near(left: dict[str, Tensor], right: dict[str, Tensor], what: Any) -> None:
    assert left.keys() == right.keys(), what
    for name, value in left.items():
        assert value.shape == right[name].shape, (what, name)
        assert (value.float() - right[name].float()).abs().max() <= BOUND, (what, name)


@pytest.mark.slow
@pytest.mark.parametrize("chain", CHAINS)
def test_values_and_moments_go_from_base_to_base(chain: str, tmp_path: Path) -> None:
    start: Path | str = "nothing"
    for epochs, (base, count) in enumerate(CHAINS[chain], 1):
        out, alone = tmp_path / f"{epochs}-{base}", tmp_path / f"{epochs}-alone"
        chain_script.run("auto", 1, epochs, alone, None)
        run_script(chain_script.__file__, base, count, epochs, out, start)
        expected = saved(alone)
        for what, values in saved(out).items():
            assert_near(values, expected[what], (base, what))
        for rank in range(count):
            held = torch.load(out / f"rank{rank}.pt", weights_only=True)
            assert_near(held, expected["state"], (base, rank))
        start = out / "last"
