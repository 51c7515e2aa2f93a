"""Dropout in every kind of adapter: it acts in training and in nothing else, on either path of the products."""

from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from families import build, outputs, randomise
from torch import nn

import lightning_peft
from lightning_peft import (
    AdaLoRA,
    Compacter,
    DoRA,
    LoRA,
    MiSS,
    ParallelAdapter,
    PEFTMethod,
    SeriesAdapter,
    VeRA,
    inject,
)
from lightning_peft.adapters.low_rank import products

# By name: a family, and the method with a dropout.
CASES: dict[str, tuple[str, Callable[[float], PEFTMethod]]] = {
    "linear": ("llama", lambda p: LoRA(r=2, dropout=p)),
    "conv1d": ("gpt2", lambda p: LoRA(r=2, dropout=p, target_modules=["c_fc", "c_proj"])),
    "a part of a layer": ("gpt2", lambda p: LoRA(r=2, dropout=p, target_modules=["c_attn"], fused_parts=["q", "v"])),
    "from the weight": ("llama", lambda p: LoRA(r=2, dropout=p, init="pissa")),
    "convolution": ("convolution", lambda p: LoRA(r=2, dropout=p, target_modules=["0"])),
    "dora": ("llama", lambda p: DoRA(r=2, dropout=p)),
    "adalora": ("llama", lambda p: AdaLoRA(dropout=p)),
    "vera": ("llama", lambda p: VeRA(r=4, dropout=p)),
    "miss": ("llama", lambda p: MiSS(r=4, dropout=p)),
    "series": ("llama", lambda p: SeriesAdapter(bottleneck=4, dropout=p)),
    "parallel": ("llama", lambda p: ParallelAdapter(bottleneck=4, dropout=p)),
    "compacter": ("llama", lambda p: Compacter(dropout=p)),
}


def adapted(name: str, dropout: float) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    family, method = CASES[name]
    if family == "convolution":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model: nn.Module = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten())
        call = lambda: model(torch.linspace(-1, 1, 48).view(1, 3, 4, 4))  # noqa: E731
    else:
        model, inputs = build(family)
        call = lambda: outputs(model, inputs)  # noqa: E731
    inject(model, method(dropout))
    randomise(model)
    return model, call


@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_dropout_acts_in_training_alone(name: str, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_MANY_ON_CPU", 0 if large else 2**30)
    model, call = adapted(name, 0.5)
    plain, without = adapted(name, 0.0)
    for is_on in (True, False):
        with torch.set_grad_enabled(is_on):
            assert torch.equal(model.eval() and call(), plain.eval() and without())
            model.train()
            assert not torch.equal(call(), call())


def test_every_method_that_has_dropout_is_here() -> None:
    everything = [getattr(lightning_peft, name) for name in lightning_peft.__all__]
    methods = [kind for kind in everything if isinstance(kind, type) and issubclass(kind, PEFTMethod) and kind.name]
    with_dropout = {kind.name for kind in methods if any(field.name == "dropout" for field in fields(kind))}
    assert with_dropout == {method(0.1).name for _, method in CASES.values()}
