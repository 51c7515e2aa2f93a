"""Several adapters in one run, and averages of adapters, on two processes, against one on the same global batches."""

from pathlib import Path
from typing import Any

import adapters_script
import pytest
import torch
from launch import run_script
from modules import assert_same

# Float32 sums in another order, over eight steps. How far apart they end depends on the processor: 1.8e-6 was seen.
BOUND = 5e-6
CASES = [
    (base, tag) for base in adapters_script.BASES for tag in adapters_script.KINDS if adapters_script.serves(base, tag)
]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("auto")
    for tag in adapters_script.KINDS:
        adapters_script.run(path, "auto", tag, 1)
    return path


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("together")
    run_script(adapters_script.__file__, ",".join(adapters_script.BASES), path)
    return path


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


@pytest.mark.parametrize(("base", "tag"), CASES)
def test_two_processes_learn_what_one_does(together: Path, single: Path, base: str, tag: str) -> None:
    alone = load(single / f"{tag}-0.pt")
    ranks = [load(together / base / f"{tag}-{rank}.pt") for rank in (0, 1)]
    assert_same(*ranks)
    assert ranks[0].keys() == alone.keys()
    for name, value in alone.items():
        assert (ranks[0][name] - value).abs().max() <= BOUND, name
        assert value.any()


@pytest.mark.parametrize("base", ["ddp", "fsdp"])
def test_checkpoints_hold_the_average(together: Path, single: Path, base: str) -> None:
    saved, alone = (load(path / "averaged-files" / "last.ckpt") for path in (together / base, single))
    for key in ("state_dict", "current_model_state"):
        assert saved[key].keys() == alone[key].keys()
        for name, value in alone[key].items():
            assert (saved[key][name] - value).abs().max() <= BOUND, name
    assert any((saved["state_dict"][n] - t).abs().max() > 1e-3 for n, t in saved["current_model_state"].items())
