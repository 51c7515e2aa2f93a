"""Adapters beside linear layers whose weights a quantiser has packed: trained and saved as any, never merged into."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import randomise
from torch import Tensor, nn

from lightning_peft import (
    BEFT,
    IA3,
    OFT,
    DoRA,
    FullFinetuning,
    LoRA,
    MiSS,
    PEFTError,
    PEFTMethod,
    VeRA,
    eject,
    inject,
    load_adapter,
    merge,
    save_adapter,
    unmerge,
)


class Packed(nn.Linear):
    """Two codes of four bits in a byte, one scale for all: the weight is ``[out · in / 2, 1]`` of uint8."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out)
        codes = ((self.weight.detach() / 0.05).round().clamp(-8, 7) + 8).to(torch.uint8).flatten()
        self.weight = nn.Parameter((codes[::2] * 16 + codes[1::2])[:, None], requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self._matrix(), self.bias)

    def _matrix(self) -> Tensor:
        codes = torch.stack([self.weight[:, 0] // 16, self.weight[:, 0] % 16], dim=1).view(self.out_features, -1)
        return (codes.float() - 8) * 0.05


class Elsewhere(nn.Module):
    """As layers of GPTQ and AWQ are: no linear layer of torch's, without a ``weight``, its tensors are buffers."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.in_features, self.out_features = d_in, d_out
        self.register_buffer("qweight", torch.randint(-8, 8, (d_in, d_out), dtype=torch.int32))
        self.register_buffer("scales", torch.full((1, d_out), 0.05))
        self.register_buffer("bias", torch.randn(d_out))

    def forward(self, x: Tensor) -> Tensor:
        found = x @ (self.qweight * self.scales).to(x.dtype)
        return found if self.bias is None else found + self.bias


def packed() -> list[nn.Module]:
    return [Packed(64, 128), Packed(128, 64)]


def elsewhere() -> list[nn.Module]:
    return [Elsewhere(64, 128), Elsewhere(128, 64)]


def _four_bits(**options: Any) -> list[nn.Module]:
    bnb = pytest.importorskip("bitsandbytes")
    layers = [bnb.nn.Linear4bit(*size, compute_dtype=torch.float32, **options) for size in ((64, 128), (128, 64))]
    return [layer.to("cpu") for layer in layers]


def nf4_double() -> list[nn.Module]:
    return _four_bits(quant_type="nf4", compress_statistics=True)


def fp4() -> list[nn.Module]:
    return _four_bits(quant_type="fp4", compress_statistics=False)


def eight_bits() -> list[nn.Module]:
    bnb = pytest.importorskip("bitsandbytes")
    return [bnb.nn.Linear8bitLt(*size, has_fp16_weights=False).to("cpu") for size in ((64, 128), (128, 64))]


def _torchao(config: str, **options: Any) -> list[nn.Module]:
    ao = pytest.importorskip("torchao.quantization")
    layers = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64))
    ao.quantize_(layers, getattr(ao, config)(**options))
    return list(layers)


def torchao_int8() -> list[nn.Module]:
    return _torchao("Int8WeightOnlyConfig")


def torchao_int4() -> list[nn.Module]:
    """Four bits in the layout that needs no kernels of a GPU's."""
    return _torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4)


def torchao_float8() -> list[nn.Module]:
    return _torchao("Float8WeightOnlyConfig")


def hqq() -> list[nn.Module]:
    quantize = pytest.importorskip("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=32)
    options = {"compute_dtype": torch.float32, "device": "cpu"}
    return [quantize.HQQLinear(nn.Linear(*size), config, **options) for size in ((64, 128), (128, 64))]


QUANTISERS: dict[str, Callable[[], list[nn.Module]]] = {
    f.__name__: f
    for f in (packed, elsewhere, nf4_double, fp4, eight_bits, torchao_int8, torchao_int4, torchao_float8, hqq)
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


def values(layer: nn.Module) -> Tensor:
    """The weight ``[out, in]`` as the quantiser itself works it out."""
    if isinstance(layer, Packed):
        return layer._matrix()
    if isinstance(layer, Elsewhere):
        return (layer.qweight * layer.scales).T
    kind, weight = type(layer).__name__, getattr(layer, "weight", None)
    if kind == "HQQLinear":
        return layer.dequantize()  # type: ignore[operator]
    if kind == "Linear4bit":
        return sys.modules["bitsandbytes"].functional.dequantize_4bit(weight.data, weight.quant_state)
    if kind == "Linear8bitLt":
        return layer.state.CB * layer.state.SCB[:, None] / 127  # type: ignore[operator,union-attr]
    return weight.dequantize()  # type: ignore[union-attr]


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
    tuned, parts = model(X), list(model[0].state_dict().values())  # type: ignore[index]
    codes = values(model[0]).clone()  # type: ignore[index]
    with pytest.raises(PEFTError, match=r"adapter of '0' cannot be merged \(its weight is quantised"):
        merge(model, unload=True)
    assert torch.equal(model(X), tuned)
    report = merge(model)
    assert (report.merged, report.kept) == (1, ("0",))
    assert "stay attached" in str(report)
    assert len(model[0].state_dict()) == len(parts)  # type: ignore[index]
    assert torch.equal(values(model[0]), codes)  # type: ignore[index]
    assert (model(X) - tuned).abs().max() <= 1e-5
    unmerge(model)
    assert torch.equal(model(X), tuned)


def test_what_needs_the_weights_values_is_refused(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(PEFTError, match=r"'0' cannot be adapted: its weight is quantised.*DoRA"):
        inject(make(), DoRA(r=4, target_modules=["0"]))
    with pytest.raises(PEFTError, match=r"'0' cannot be adapted: A and B start in its weight, which is quantised"):
        inject(make(), LoRA(r=4, init="pissa", target_modules=["0"]))
    assert inject(make(), DoRA(r=4, target_modules=["3"])) == ["3"]


def test_they_are_not_trained_whole(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(PEFTError, match="FullFinetuning trains every weight, and that of '0' is quantised"):
        inject(make(), FullFinetuning())
    with pytest.raises(PEFTError, match="train_also: the weight of '2' is quantised"):
        inject(make(), LoRA(r=4, target_modules=["0"]), train_also=["2"])


def test_merged_on_request(make: Callable[[], nn.Module]) -> None:
    """Against the weight that the quantiser itself works out, plus scale · B A."""
    model = make()
    inject(model, LoRA(r=4, alpha=8, target_modules=["0"]))
    randomise(model)
    tuned, before = model(X).detach(), [values(model[n]).clone() for n in (0, 2)]  # type: ignore[index]
    pair = [getattr(model[0].peft.default, f"lora_{letter}").detach() for letter in "AB"]  # type: ignore[index]
    report = merge(model, unload=True, dequantize=True)
    assert (report.merged, report.kept, report.dequantized) == (1, (), 2)
    assert "Made 2 quantised layers float ones" in str(report)
    assert [type(model[n]) for n in (0, 2)] == [nn.Linear, nn.Linear]  # type: ignore[index]
    close = 1e-5
    assert (model[0].weight - before[0] - 2 * pair[1] @ pair[0]).abs().max() <= close  # type: ignore[index]
    assert (model[2].weight - before[1]).abs().max() <= close  # type: ignore[index]
    assert (model(X) - tuned).abs().max() <= 10 * close
    assert not [name for name, _ in model.named_modules() if "peft" in name]


def test_unmerged_they_stay_float(make: Callable[[], nn.Module]) -> None:
    model = make()
    inject(model, LoRA(r=4, target_modules=["0"]))
    randomise(model)
    merge(model, dequantize=True)
    merged = model(X)
    unmerge(model)
    assert (model(X) - merged).abs().max() <= 1e-4
    assert type(model[0]) is nn.Linear  # type: ignore[index]
    model.load_state_dict(model.state_dict())


def test_other_methods_beside_them(make: Callable[[], nn.Module]) -> None:
    kinds: dict[type[PEFTMethod], dict[str, Any]] = {
        IA3: {},
        VeRA: {"r": 4},
        OFT: {"block_size": 8},
        MiSS: {},
        BEFT: {},
    }
    for method in (kind(target_modules=["0"], **options) for kind, options in kinds.items()):
        model = make()
        base = model(X)
        inject(model, method)
        assert torch.equal(model(X), base)
        randomise(model)
        tuned = model(X)
        assert (tuned - base).abs().max() > 1e-3
        assert merge(model).kept == ("0",)
        assert torch.equal(model(X), tuned)


def test_weights_that_a_quantiser_has_made_of_its_codes(tmp_path: Path) -> None:
    """As compressed-tensors does in a model's first run: its adapters are for the float base all the same."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 32))
    rounded = nn.Sequential(nn.Linear(64, 32))
    rounded.load_state_dict(plain.state_dict())
    with torch.no_grad():
        rounded[0].weight.mul_(56).round_().div_(56)  # as coarse as four bits: 6 % off
    inject(rounded, LoRA(r=2))
    randomise(rounded)
    save_adapter(rounded, tmp_path / "without a mark")
    with pytest.raises(PEFTError, match="written for another base model"):
        load_adapter(plain, tmp_path / "without a mark")
    eject(rounded)
    rounded[0].quantization_scheme = "W4A16"
    inject(rounded, LoRA(r=2))
    randomise(rounded)
    save_adapter(rounded, tmp_path / "adapter")
    load_adapter(plain, tmp_path / "adapter")
    assert (plain(X) - rounded(X)).abs().max() < 0.3


@pytest.mark.parametrize(("double", "most"), [(True, 0.27), (False, 0.29)])
def test_four_bits_take_a_third_of_bfloat16(double: bool, most: float) -> None:
    """Of what a layer holds, scales and tables of codes included; the adapters beside it stay whole."""
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(1024, 2048, bias=False, quant_type="nf4", compress_statistics=double).to("cpu")
    model = nn.Sequential(layer)
    inject(model, LoRA(r=8))
    state = layer.weight.quant_state
    held = [layer.weight, state.absmax, state.code]
    if double:
        held += [state.state2.absmax, state.state2.code, state.offset]
    taken = sum(tensor.untyped_storage().nbytes() for tensor in held)
    assert 0.25 < taken / (2 * 1024 * 2048) <= most <= 0.35
    assert all(parameter.dtype == torch.float32 for parameter in layer.peft.parameters())
