"""Adapters beside linear layers whose weights a quantiser has packed: trained and saved as any, never merged into."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import randomise
from torch import Tensor, nn

from lightning_peft import IA3, DoRA, LoRA, PEFTError, VeRA, eject, inject, load_adapter, merge, save_adapter, unmerge


class Packed(nn.Linear):
    """Two codes of four bits in a byte, one scale for all: the weight is ``[out · in / 2, 1]`` of uint8."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out)
        codes = ((self.weight.detach() / 0.05).round().clamp(-8, 7) + 8).to(torch.uint8).flatten()
        self.weight = nn.Parameter((codes[::2] * 16 + codes[1::2])[:, None], requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        codes = torch.stack([self.weight[:, 0] // 16, self.weight[:, 0] % 16], dim=1).view(self.out_features, -1)
        return nn.functional.linear(x, (codes.to(x.dtype) - 8) * 0.05, self.bias)


def packed() -> list[nn.Module]:
    return [Packed(64, 128), Packed(128, 64)]


def four_bits() -> list[nn.Module]:
    bnb = pytest.importorskip("bitsandbytes")
    return [bnb.nn.Linear4bit(*size, compute_dtype=torch.float32).to("cpu") for size in ((64, 128), (128, 64))]


def eight_bits() -> list[nn.Module]:
    bnb = pytest.importorskip("bitsandbytes")
    return [bnb.nn.Linear8bitLt(*size, has_fp16_weights=False).to("cpu") for size in ((64, 128), (128, 64))]


def tensor_class() -> list[nn.Module]:
    ao = pytest.importorskip("torchao.quantization")
    layers = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64))
    ao.quantize_(layers, ao.Int8WeightOnlyConfig())
    return list(layers)


QUANTISERS: dict[str, Callable[[], list[nn.Module]]] = {
    f.__name__: f for f in (packed, four_bits, eight_bits, tensor_class)
}
X = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=QUANTISERS)
def make(request: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            first, second = QUANTISERS[request.param]()
            # In eval mode bitsandbytes packs anew on some CPUs, in a way that no gradient passes.
            return nn.Sequential(first, nn.Tanh(), second, nn.Linear(64, 4)).requires_grad_(False).train()

    return build


def values(weight: Any) -> Tensor:
    return weight if weight.dtype in (torch.uint8, torch.int8) else weight.dequantize()


def test_they_train_and_are_saved(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Against x W0ᵀ + scale · x Aᵀ Bᵀ with the layer's own outputs for the first term."""
    model, base = make(), make()
    keys = list(model.state_dict())
    inject(model, LoRA(r=4, alpha=8, target_modules=["0", "2"]))
    # Some quantisers have other kernels where gradients are asked for.
    with torch.no_grad():
        assert torch.equal(model(X), base(X))
    randomise(model)
    state = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in state.values()} == {torch.float32}
    assert [tuple(p.shape) for p in state.values()] == [(4, 64), (128, 4), (4, 128), (64, 4)]

    def layer(number: int, x: Tensor) -> Tensor:
        a, b = (state[f"{number}.peft.default.lora_{letter}"] for letter in "AB")
        return base[number](x) + 2 * x @ a.T @ b.T  # type: ignore[index]

    expected = base[3](layer(2, layer(0, X).tanh()))  # type: ignore[index]
    assert (model(X) - expected).abs().max() <= 1e-5
    ours = torch.autograd.grad(model(X).square().sum(), list(state.values()))
    theirs = torch.autograd.grad(expected.square().sum(), list(state.values()))
    assert all((a - b).abs().max() <= 1e-4 * b.abs().max() for a, b in zip(ours, theirs, strict=True))

    save_adapter(model, tmp_path / "adapter")
    loaded = make()
    load_adapter(loaded, tmp_path / "adapter")
    assert torch.equal(loaded(X), model(X))
    eject(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(X), base(X))


def test_nothing_is_merged_into_them(make: Callable[[], nn.Module]) -> None:
    model = make()
    inject(model, LoRA(r=4, target_modules=["0", "3"]))
    randomise(model)
    tuned, weight = model(X), model[0].weight  # type: ignore[index]
    codes = values(weight).clone()
    with pytest.raises(PEFTError, match=r"adapter of '0' cannot be merged \(its weight is quantised"):
        merge(model, unload=True)
    assert torch.equal(model(X), tuned)
    report = merge(model)
    assert (report.merged, report.kept) == (1, ("0",))
    assert "stay attached" in str(report)
    assert model[0].weight is weight  # type: ignore[index]
    assert torch.equal(values(weight), codes)
    assert (model(X) - tuned).abs().max() <= 1e-5
    unmerge(model)
    assert torch.equal(model(X), tuned)


def test_what_needs_the_weights_values_is_refused(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(PEFTError, match=r"'0' cannot be adapted: its weight is quantised.*DoRA"):
        inject(make(), DoRA(r=4, target_modules=["0"]))
    assert inject(make(), DoRA(r=4, target_modules=["3"])) == ["3"]


def test_other_methods_beside_them(make: Callable[[], nn.Module]) -> None:
    for method in (IA3(target_modules=["0"]), VeRA(r=4, target_modules=["0"])):
        model = make()
        base = model(X)
        inject(model, method)
        assert torch.equal(model(X), base)
        randomise(model)
        tuned = model(X)
        assert (tuned - base).abs().max() > 1e-3
        assert merge(model).kept == ("0",)
        assert torch.equal(model(X), tuned)
