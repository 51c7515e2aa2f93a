"""Layers that are narrower than the rank: presets give them the rank that fits, everywhere alike; HF PEFT judges."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import peft
import pytest
import torch
from families import randomise
from modules import Regression, SteppedRegression, Stop, assert_same, loader, trainer
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model

from lightning_peft import (
    AdaLoRA,
    DoRA,
    LoRA,
    PEFTError,
    PEFTMethod,
    PEFTStrategy,
    inject,
    load_adapter,
    merge,
    save_adapter,
)
from lightning_peft.callbacks import AdapterCheckpoint


class Narrow(nn.Module):
    """The head of two outputs has a name in which that of another layer ends."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.ModuleDict({"head": nn.Linear(8, 8), "narrow": nn.Linear(3, 8)})
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner["head"](x).tanh() + self.inner["narrow"](x[:, :3]))


METHODS: dict[str, PEFTMethod] = {
    "lora": LoRA(r=4, alpha=6),
    "rslora": LoRA(r=4, alpha=6, use_rslora=True),
    "dora": DoRA(r=4, alpha=6),
    "pissa": LoRA(r=4, alpha=6, init="pissa"),
    "olora": LoRA(r=4, alpha=6, init="olora"),
    "adalora": AdaLoRA(init_r=4, target_r=2, alpha=6),
}
LOWERED = r"r=4 is more than fits in these modules, .* that does: 'inner\.narrow' \(3\), 'head' \(2\)\."


def adapted(method: PEFTMethod) -> tuple[nn.Module, Tensor]:
    model = Narrow()
    with pytest.warns(UserWarning, match=LOWERED) as said:
        inject(model, method)
    assert len(said) == 1
    randomise(model)
    return model, torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", METHODS)
def test_another_reader_finds_the_same(name: str, tmp_path: Path) -> None:
    model, x = adapted(METHODS[name])
    save_adapter(model, tmp_path / "a")
    judge = peft.PeftModel.from_pretrained(Narrow(), tmp_path / "a").eval()
    assert (judge(x) - model(x)).abs().max() <= 1e-6
    again = Narrow()
    load_adapter(again, tmp_path / "a")
    assert (again(x) - model(x)).abs().max() <= 1e-6


@pytest.mark.parametrize("name", [name for name in METHODS if "adalora" not in name])
def test_by_hand(name: str) -> None:
    """The scale is that of the module's own rank, as a rank by pattern would have it."""
    method: Any = METHODS[name]
    model, _ = adapted(method)
    found = {name.removesuffix(".peft.default"): a for name, a in model.named_modules() if hasattr(a, "lora_A")}
    ranks = {name: len(adapter.lora_A) for name, adapter in found.items()}
    assert ranks == {"inner.head": 4, "inner.narrow": 3, "head": 2}
    for host, adapter in found.items():
        assert adapter.scale == 6 / (ranks[host] ** 0.5 if method.use_rslora else ranks[host])


@pytest.mark.parametrize("name", METHODS)
def test_merging(name: str) -> None:
    model, x = adapted(METHODS[name])
    expected = model(x)
    assert merge(model, unload=True).merged == 3
    assert (model(x) - expected).abs().max() <= 1e-6


class NarrowRegression(SteppedRegression):
    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4), nn.Linear(4, 4))


@pytest.mark.parametrize("directory", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_is_the_uninterrupted_one(name: str, directory: bool, tmp_path: Path) -> None:
    make = AdapterCheckpoint if directory else pl.callbacks.ModelCheckpoint

    def strategy() -> PEFTStrategy:
        method: Any = METHODS[name]
        wider = replace(method, **{"init_r" if name == "adalora" else "r": 8})
        return PEFTStrategy(wider, merge_on_train_end=False)

    def run(folder: str, *callbacks: pl.Callback, **options: Any) -> tuple[pl.LightningModule, Any]:
        checkpoint = make(dirpath=tmp_path / folder, save_last=True)
        module = NarrowRegression()
        fit = trainer(tmp_path, strategy(), max_steps=6, callbacks=[checkpoint, *callbacks])
        fit.fit(module, loader(24), **options)
        return module, checkpoint.last_model_path

    whole, last = run("whole")
    _, half = run("half", Stop(3))
    resumed, _ = run("resumed", ckpt_path=half)
    assert_same(whole.state_dict(), resumed.state_dict())
    loaded = NarrowRegression.load_from_checkpoint(last)
    assert_same(whole.state_dict(), loaded.state_dict())


def test_a_rank_that_was_asked_for_is_an_error() -> None:
    for options in ({"target_modules": ["all-linear", "head"]}, {"rank_pattern": {"inner.narrow": 4}}):
        message = r"r=4 was given, but '[a-z.]+' is \d → \d: .*rank_pattern=.*train_also=\['[a-z.]+'\]"
        with pytest.raises(PEFTError, match=message):
            inject(Narrow(), LoRA(r=4, **options))
    with pytest.raises(PEFTError, match=r"init_r=4 was given, but 'head' is 8 → 2.*train_also"):
        inject(Narrow(), AdaLoRA(init_r=4, target_r=1, target_modules=["re:head"]))


def test_the_names_in_a_file_are_exact(tmp_path: Path) -> None:
    """``head`` alone would be ``inner.head`` too, to every reader."""
    model, _ = adapted(METHODS["lora"])
    save_adapter(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"^head": 2, "inner.narrow": 3}
    assert config["r"] == 4


def test_attention_of_two_widths() -> None:
    """All weights of one attention have one rank: that which the narrowest takes."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, kdim=3, vdim=5)})
    with pytest.warns(UserWarning, match=r"largest rank that does: 'attention' \(3\)\."):
        inject(model, LoRA(r=4))
    assert {p.shape[0] for n, p in model.named_parameters() if n.endswith("lora_A")} == {3}


def test_parts_of_a_fused_layer() -> None:
    model = GPT2Model(GPT2Config(vocab_size=9, n_embd=4, n_layer=1, n_head=2))
    with pytest.warns(UserWarning, match=r"largest rank that does: 'h\.0\.attn\.c_attn' \(4\)"):
        inject(model, LoRA(r=6, fused_parts=["q", "v"]))
    found = dict(model.named_parameters())
    assert found["h.0.attn.c_attn.peft.default.lora_A"].shape == (8, 4)


def test_the_flag_on_small_heads(tmp_path: Path) -> None:
    for outputs in (1, 2):
        module = Regression()
        module.net[2] = nn.Linear(16, outputs)
        module.loss = lambda x, module=module: module(x).square().mean()
        trainer(tmp_path, "peft_lora").fit(module, loader())


@pytest.mark.parametrize("name", METHODS)
def test_training_goes_on_from_a_file(name: str, tmp_path: Path) -> None:
    """The file has the ranks by name, the strategy a preset: they are the same."""
    method: Any = METHODS[name]
    first = NarrowRegression()
    inject(first, method)
    save_adapter(first, tmp_path / "a")

    def loaded() -> pl.LightningModule:
        module = NarrowRegression()
        load_adapter(module, tmp_path / "a")
        return module

    module, checkpoint = loaded(), pl.callbacks.ModelCheckpoint(dirpath=tmp_path / "c", save_last=True)
    strategy = PEFTStrategy(method, merge_on_train_end=False)
    trainer(tmp_path, strategy, max_steps=2, callbacks=[checkpoint]).fit(module, loader())
    again = NarrowRegression.load_from_checkpoint(checkpoint.last_model_path)
    assert_same(module.state_dict(), again.state_dict())
    other = replace(method, rank_pattern={"net.0": 1})
    with pytest.raises(PEFTError, match=r"rank_pattern=.* would have no effect"):
        trainer(tmp_path, PEFTStrategy(other), max_steps=2).fit(loaded(), loader())
