"""Modules that are cut up over two processes: what is done by hand is kept, also after a forward pass."""

import importlib.util
from pathlib import Path
from typing import Any

import by_hand_script
import lightning as L
import pytest
import torch
from distributed_script import Recorded
from launch import run_script
from modules import Regression, assert_same, by_hand, inputs, loader, trainer
from torch import Tensor

from lightning_peft import LoRA, PEFTStrategy, load_adapter, save_adapter
from lightning_peft.storage.state import adapter_state_dict

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)

# Float32 sums in another order.
BOUND = 1e-6


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left, and one: ``two`` and ``other`` after two epochs and three."""
    out = tmp_path_factory.mktemp("by_hand")
    for name, epochs in (("two", 2), ("other", 3)):
        L.seed_everything(0)
        module = Recorded(out, name)
        fitted = trainer(out, PEFTStrategy(LoRA(r=2), merge_on_train_end=False), max_epochs=epochs)
        fitted.fit(module, loader(batch_size=8))
        save_adapter(module, out / name)
        torch.save(dict(adapter_state_dict(module)), out / f"{name}.pt")
        fitted.save_checkpoint(out / f"{name}.ckpt")
    run_script(by_hand_script.__file__, out)
    return out


@pytest.fixture(scope="module", params=by_hand_script.BASES)
def base(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def ranks(base: str, out: Path) -> list[dict[str, Any]]:
    return [torch.load(out / f"rank{rank}.pt", weights_only=True)[base] for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(out: Path) -> dict[str, Tensor]:
    """The adapters that one process learnt."""
    state: dict[str, Tensor] = torch.load(out / "two.pt", weights_only=True)
    return state


def base_weights() -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in Regression().named_parameters()}


def test_a_merge_is_kept(ranks: list[dict[str, Any]], alone: dict[str, Tensor]) -> None:
    expected = by_hand(alone, inputs())
    for seen in ranks:
        for what in ("trained", "merged", "merged later"):
            assert (seen[what] - expected).abs().max() <= BOUND, what
        assert torch.equal(seen["merged"], seen["merged later"])
        assert seen["is merged"]
        assert seen["loss later"] == pytest.approx(float((expected - inputs()[:, :4]).square().mean()), abs=BOUND)


def test_what_is_gathered_by_hand_is_not_merged(out: Path) -> None:
    for rank in (0, 1):
        seen = torch.load(out / f"rank{rank}.pt", weights_only=True)["stage3"]
        assert "'net.2.weight' is gathered" in seen["in a context"]


def test_another_trainer_is_refused_what_fsdp_has_cut_up(out: Path) -> None:
    for rank in (0, 1):
        seen = torch.load(out / f"rank{rank}.pt", weights_only=True)["fsdp"]
        assert "was cut up by the strategy of another Trainer" in seen["another trainer"]


@pytest.mark.parametrize("what", ["unmerged", "ejected"])
def test_the_base_comes_back_bit_for_bit(ranks: list[dict[str, Any]], what: str) -> None:
    for seen in ranks:
        assert_same(seen[what], base_weights())
    assert (ranks[0]["plain"] - Regression()(inputs())).abs().max() <= BOUND


@pytest.mark.parametrize("when", ["merged", "saved"])
def test_what_is_saved_is_whole(base: str, ranks: list[dict[str, Any]], out: Path, when: str) -> None:
    module = Regression()
    load_adapter(module, out / f"{base}-{when}")
    assert (module(inputs()) - ranks[0]["trained"]).abs().max() <= BOUND
    assert_same(ranks[0]["state"], dict(adapter_state_dict(module)))
    assert_same(ranks[1]["state"], ranks[0]["state"])


def test_what_is_loaded_is_kept(ranks: list[dict[str, Any]], out: Path) -> None:
    other = torch.load(out / "other.pt", weights_only=True)
    for seen in ranks:
        assert (seen["loaded"] - by_hand(other, inputs())).abs().max() <= BOUND
        for what in ("test", "fit"):
            assert_same(seen["checkpoint"][what], other)
            assert_same(seen["checkpoint"][f"{what} unmerged"], base_weights())
