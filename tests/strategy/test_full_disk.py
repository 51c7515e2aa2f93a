"""A process that cannot write its part of a checkpoint: all processes say so, none waits, and the next run saves."""

import importlib.util
from typing import Any

import full_disk_script
import pytest
import torch
from launch import run_script

pytestmark = pytest.mark.slow

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    out = tmp_path_factory.mktemp("full")
    run_script(full_disk_script.__file__, out)
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("case", full_disk_script.CASES)
def test_no_process_is_left_waiting(case: tuple[str, str, int], ranks: list[dict[Any, Any]]) -> None:
    for rank in ranks:
        seen = rank[case]
        assert "Cannot write" in seen["said"]
        assert "File too large" in seen["said"] or "unexpected pos" in seen["said"]
        assert not {"last", "last.ckpt"} & set(seen["left"])
        assert {"last", "last.ckpt"} & set(seen["then"])
