"""Methods whose adapters are more than two trained matrices, on two processes against one on the same batches."""

from pathlib import Path

import deltas_script
import pytest
import torch
from launch import run_script
from modules import assert_same

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("methods")
    deltas_script.run(path, "auto", 1)
    run_script(deltas_script.__file__, path)
    return path


@pytest.mark.parametrize("base", deltas_script.TESTED)
@pytest.mark.parametrize("name", deltas_script.METHODS)
def test_two_processes_learn_what_one_does(name: str, base: str, out: Path) -> None:
    alone, *ranks = (torch.load(out / f"{name}-{tag}.pt") for tag in ("auto-0", f"{base}-0", f"{base}-1"))
    assert_same(ranks[0], ranks[1])
    assert alone.keys() == ranks[0].keys()
    for key, value in alone.items():
        assert (ranks[0][key] - value).abs().max() <= 1e-6, key
        assert torch.equal(ranks[0][key] == 0, value == 0), key


@pytest.mark.parametrize("base", deltas_script.TESTED)
def test_two_processes_take_ranks_away(base: str, out: Path) -> None:
    kept = [v for key, v in torch.load(out / f"adalora-{base}-0.pt").items() if key.endswith(".lora_E")]
    assert len(kept) == 2
    assert sum(int((values != 0).sum()) for values in kept) == 2 * 2
