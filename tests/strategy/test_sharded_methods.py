"""Every kind of method on a model in shards, on two processes, against one process on the same global batches."""

from functools import cache
from pathlib import Path
from typing import Any

import methods_script
import pytest
import torch
from launch import run_script
from methods_script import METHODS
from modules import assert_same, inputs

from lightning_peft import load_adapter

# Float32 sums in another order; measured 1.3e-6 in the adapters and 2e-6 in the logits.
BOUND = 5e-6
MERGED = {"dora", "vera", "loha", "ia3"}


# A merge that reads the weights, shared weights, taps beside norms, parameters of the base; the rest are like these.
QUICK = ("dora", "compacter", "pfeiffer", "bitfit")
CASES = [
    pytest.param(base, name, marks=() if name in QUICK and base != "fsdp2_late" else pytest.mark.slow)
    for base in ("fsdp", "fsdp2", "fsdp2_late")
    for name in METHODS
]


@cache
def launched(folder: Path, late: bool, quick: bool) -> Path:
    """What two processes left, of one launch for several bases and methods."""
    bases = "fsdp2_late" if late else "fsdp,fsdp2"
    run_script(methods_script.__file__, folder, bases, ",".join(n for n in METHODS if (n in QUICK) == quick))
    return folder


@cache
def alone(folder: Path, name: str) -> Path:
    """What one process left."""
    methods_script.run(folder, f"{name}-two", name, "auto", 1, 2)
    methods_script.run(folder, f"{name}-three", name, "auto", 1, 3)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


@pytest.mark.parametrize(("base", "name"), CASES)
def test_many_processes_learn_what_one_does(base: str, name: str, folder: Path) -> None:
    together = launched(folder, base == "fsdp2_late", name in QUICK)
    single = alone(folder, name)
    plain = methods_script.Classifier(folder, "plain", "auto")(methods_script.ids(inputs()[:4]))
    for tag in ("two", "three"):  # the second went on from the first one's checkpoint
        expected = load(single / f"{name}-{tag}-rank0.pt")
        ranks = [load(together / f"{base}-{name}-{tag}-rank{rank}.pt") for rank in (0, 1)]
        assert_same(ranks[0]["adapters"], ranks[1]["adapters"])
        for rank in ranks:
            assert rank["adapters"].keys() == expected["adapters"].keys()
            for key, value in expected["adapters"].items():
                assert (rank["adapters"][key] - value).abs().max() <= BOUND, (tag, key)
            assert (rank["logits"] - expected["logits"]).abs().max() <= 2 * BOUND, tag
            assert (rank["logits"] - plain).abs().max() > 0.1
            assert rank["merged"] == (name in MERGED)
        loaded = methods_script.Classifier(folder, "loaded", "auto")
        load_adapter(loaded, together / f"{base}-{name}-{tag}-saved" / "last")
        assert (loaded(methods_script.ids(inputs()[:4])) - ranks[0]["logits"]).abs().max() <= 2 * BOUND
