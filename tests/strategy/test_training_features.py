"""Checkpointing, accumulation, clipping, compilation and narrow dtypes, on every base, with frozen embeddings."""

from pathlib import Path
from typing import Any

import features_script
import pytest
import torch
from launch import run_script

from lightning_peft import LoRA

EXACT = [feature for feature in features_script.FEATURES if not feature.startswith("bf16")]
BASES = ["ddp", "fsdp", "fsdp2", "tensor"]

# Gradients are about 0.2 in size. Float32 sums in another order: measured 4e-8. bfloat16 keeps 8 bits: measured 1e-3.
BOUND = 1e-6
NARROW_BOUND = 5e-3
SCALE = LoRA(r=2).alpha / 2


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("auto")
    for feature in features_script.FEATURES:
        features_script.run(path, "auto", feature, 1)
    return path


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left, on one base after the other: most of the time goes into starting them."""
    path = tmp_path_factory.mktemp("together")
    run_script(features_script.__file__, ",".join(BASES), path)
    return path


@pytest.fixture(scope="module", params=["auto", *BASES])
def out(request: pytest.FixtureRequest, single: Path) -> Path:
    if request.param == "auto":
        return single
    return Path(request.getfixturevalue("together")) / str(request.param)


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def assert_near(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], bound: float) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert (left[name] - right[name]).abs().max() <= bound, name


@pytest.mark.parametrize("feature", EXACT)
def test_gradients_and_training_are_those_of_one_plain_process(out: Path, single: Path, feature: str) -> None:
    judge = feature if feature == "clipping" else "plain"
    for rank in range(len(list(out.glob("plain-?.pt")))):
        assert_near(load(out / f"{feature}-{rank}.pt")["grads"], load(single / f"{judge}-0.pt")["grads"], BOUND)
        assert_near(load(out / f"{feature}-{rank}-end.pt"), load(single / f"{judge}-0-end.pt"), BOUND)


def test_the_gradients_matter(single: Path) -> None:
    grads = load(single / "plain-0.pt")["grads"]
    assert all(grad.any() for name, grad in grads.items() if name.endswith("lora_B"))


@pytest.mark.parametrize("feature", ["checkpointing", "reentrant"])
def test_checkpointing_runs_layers_again(out: Path, feature: str) -> None:
    assert load(out / "plain-0.pt")["calls"] == 1
    assert load(out / f"{feature}-0.pt")["calls"] == 2


def test_clipping_is_by_the_norm_of_all_gradients(out: Path) -> None:
    grads = load(out / "clipping-0.pt")["grads"]
    norm = torch.cat([grad.flatten() for grad in grads.values()]).norm()
    assert norm == pytest.approx(0.01, rel=1e-3)


def test_one_process_sends_whole_adapters_to_a_server(out: Path) -> None:
    """At the start and after each of three steps; what it has last is what was learnt."""
    found = [load(file) for file in sorted(out.glob("served-?.pt"))]
    assert [len(seen["calls"]) for seen in found] == [2 * 4, *(0 for _ in found[1:])]
    sent, state = found[0]["loaded"]["policy"], load(out / "plain-0-end.pt")
    learnt = [name for name in state if name.endswith("lora_A")]
    assert 2 * len(learnt) == len(sent)
    for name in learnt:
        host = name.partition(".peft.")[0].removeprefix("model.")
        a, b = (sent[f"base_model.model.{host}.lora_{letter}.weight"] for letter in "AB")
        expected = SCALE * state[name.replace("lora_A", "lora_B")] @ state[name]
        assert (b @ a - expected).abs().max() <= 1e-6, name


@pytest.mark.parametrize("feature", ["bf16-mixed", "bf16-true"])
def test_narrow_dtypes_train_float32_adapters(out: Path, single: Path, feature: str) -> None:
    found = load(out / f"{feature}-0.pt")
    assert found["dtypes"] == ["torch.float32"]
    assert_near(found["grads"], load(single / "plain-0.pt")["grads"], NARROW_BOUND)
