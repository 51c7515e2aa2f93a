"""Adapters that a file put into an encoder and into the head beside it: more of them, and runs.

The judge is the model without adapters, with the weights that the formula of LoRA gives from their tensors.
"""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from families import build, randomise
from modules import assert_same, trainer
from torch import Tensor, nn
from torch.func import functional_call

from lightning_peft import (
    BitFit,
    LoRA,
    PEFTError,
    PEFTStrategy,
    adapter_state_dict,
    combine,
    eject,
    inject,
    load_adapter,
    merge,
    save_adapter,
    set_adapter,
)

IDS = torch.arange(24).reshape(4, 6)
SCALES = {"default": 8.0, "more": 4.0, "third": 4.0}


class Ranker(L.LightningModule):
    """A transformers model, and a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.encoder = build("llama")[0].model
            self.head = nn.Linear(self.encoder.config.hidden_size, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(ids).last_hidden_state[:, -1])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch).square().mean()

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("loss", self(batch).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def expected(module: Ranker, name: str) -> Tensor:
    """Outputs with the adapter ``name`` of ``module``, in plain torch."""
    base = Ranker()
    weights, state = dict(base.named_parameters()), adapter_state_dict(module)
    for host in {key.split(".peft.")[0] for key in state if f".peft.{name}." in key}:
        a, b = (state[f"{host}.peft.{name}.lora_{which}"] for which in "AB")
        weights[f"{host}.weight"] = weights[f"{host}.weight"] + SCALES[name] * b @ a
    with torch.no_grad():
        return functional_call(base, weights, IDS)


def same(module: Ranker, outputs: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(module(IDS), outputs, rtol=1e-4, atol=1e-5)


def batches() -> Any:
    return torch.utils.data.DataLoader(IDS, batch_size=2)


def run(module: Ranker, folder: Path, epochs: int, **given: Any) -> Ranker:
    fitted = trainer(folder, PEFTStrategy(merge_on_train_end=False), max_epochs=epochs)
    fitted.fit(module, batches(), **given)
    fitted.save_checkpoint(folder / f"{epochs}.ckpt")
    return module


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    module = Ranker()
    inject(module, LoRA(r=2))
    randomise(module)
    save_adapter(module, tmp_path / "adapter")
    return tmp_path / "adapter"


def loaded(directory: Path) -> Ranker:
    module = Ranker()
    load_adapter(module, directory)
    return module


def with_more(directory: Path) -> Ranker:
    module = loaded(directory)
    inject(module, LoRA(r=4), name="more")
    return module


def test_one_more_is_put_around_them(directory: Path) -> None:
    module = with_more(directory)
    first = expected(module, "default")
    same(module, first)
    set_adapter(module, "more")
    same(module, Ranker()(IDS))
    randomise(module)
    first, second = expected(module, "default"), expected(module, "more")
    assert not torch.allclose(first, second)
    same(module, second)
    set_adapter(module, "default")
    same(module, first)
    names = combine(module, ["default", "more"], [1.0, 0.0], "both")
    assert "head" in names
    assert "encoder.layers.0.mlp.up_proj" in names
    set_adapter(module, "both")
    same(module, first)
    set_adapter(module, "more")
    merge(module)
    same(module, second)
    eject(module)
    base = Ranker()
    assert_same(dict(module.state_dict()), dict(base.state_dict()))
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_one_more_is_loaded_beside_them(directory: Path, tmp_path: Path) -> None:
    module = with_more(directory)
    randomise(module)
    save_adapter(module, tmp_path / "more", name="more")
    both = loaded(directory)
    for name in ("more", "third"):
        load_adapter(both, tmp_path / "more", name=name)
        set_adapter(both, name)
        same(both, expected(module, "more"))
    load_adapter(module, directory, name="third")
    set_adapter(module, "third")
    same(module, expected(loaded(directory), "default"))


def test_what_is_around_a_part_is_not_taken_away_with_it(directory: Path) -> None:
    module = with_more(directory)
    for act in (eject, lambda part: merge(part, unload=True)):
        with pytest.raises(PEFTError, match="which was injected into a module around this LlamaModel"):
            act(module.encoder)
    with pytest.raises(PEFTError, match="already has an adapter 'more'"):
        inject(module.encoder, LoRA(r=3), name="more")
    module = loaded(directory)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for method, also in ((BitFit(), ()), (LoRA(r=4), ("encoder.layers.0",))):
        with pytest.raises(
            PEFTError, match=r"trained itself belongs to one adapter|trains parameters of the model itself"
        ):
            inject(module, method, name="more", train_also=also)
    assert_same(dict(module.state_dict()), before)


def test_a_part_that_was_adapted_first_keeps_its_adapter_under_that_name() -> None:
    module = Ranker()
    inject(module.encoder, LoRA(r=2))
    with pytest.raises(
        PEFTError, match=r"'encoder\..*' already has an adapter 'default', which was injected into a part"
    ):
        inject(module, LoRA(r=4))
    inject(module, LoRA(r=4, target_modules=["head"]))
    set_adapter(module, "default")
    randomise(module)
    assert any("head.peft.default" in name for name in adapter_state_dict(module))


def test_runs(directory: Path, tmp_path: Path) -> None:
    """A module that is made anew has them after the checkpoint, whether the file is loaded first or not."""
    first, whole = run(loaded(directory), tmp_path, 1), run(loaded(directory), tmp_path, 2)
    last = tmp_path / "1.ckpt"
    same(Ranker.load_from_checkpoint(last), expected(first, "default"))
    for module in (loaded(directory), Ranker()):
        same(run(module, tmp_path, 2, ckpt_path=last), expected(whole, "default"))
    tested = trainer(tmp_path, PEFTStrategy(LoRA(r=2))).test(Ranker(), batches(), last, verbose=False)[0]
    assert tested["loss"] == pytest.approx(expected(first, "default").square().mean().item(), rel=1e-4)
    with pytest.raises(PEFTError, match=r"r=3 \(there 2\)"):
        trainer(tmp_path, PEFTStrategy(LoRA(r=3)), max_epochs=2).fit(Ranker(), batches(), ckpt_path=last)


def test_runs_of_one_more(directory: Path, tmp_path: Path) -> None:
    """Which of them runs is in the checkpoint, though that part has no adapter of that name of its own."""

    def made() -> Ranker:
        module = with_more(directory)
        set_adapter(module, "more")
        return module

    first, whole = run(made(), tmp_path, 1), run(made(), tmp_path, 2)
    again = Ranker.load_from_checkpoint(tmp_path / "1.ckpt")
    same(again, expected(first, "more"))
    set_adapter(again, "default")
    same(again, expected(loaded(directory), "default"))
    for module in (made(), Ranker()):
        resumed = run(module, tmp_path, 2, ckpt_path=tmp_path / "1.ckpt")
        same(resumed, expected(whole, "more"))
        assert_same(adapter_state_dict(resumed), adapter_state_dict(whole))
