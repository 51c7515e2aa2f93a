"""What is the convolutions' own in IA3, LoHa and LoKr: sides of a vector, cores of kernels. HF PEFT is the judge."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import strongly
from torch import Tensor, nn
from unchanged import assert_unchanged, snapshot

from lightning_peft import (
    IA3,
    LoHa,
    LoKr,
    PEFTError,
    eject,
    from_peft_config,
    inject,
    load_adapter,
    merge,
    save_adapter,
    unmerge,
)

Build = Callable[[], nn.Module]

LAYERS: dict[str, Build] = {
    "1x1": lambda: nn.Conv2d(4, 6, 1),
    "stride, padding": lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), bias=False),
    "dilation": lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2),
    "groups": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "one dimension": lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1),
    "one dimension, 1": lambda: nn.Conv1d(4, 6, 1),
    "one dimension, groups": lambda: nn.Conv1d(4, 6, 3, groups=2, dilation=2),
}
# HF PEFT pads what it adds with zeros, whatever the layer pads with.
PADDED: dict[str, Build] = {
    "circular, same": lambda: nn.Conv2d(4, 6, (4, 3), padding="same", dilation=2, padding_mode="circular")
}
CORES: dict[str, LoHa | LoKr] = {
    "LoHa": LoHa(r=3, alpha=6, use_effective_conv2d=True, target_modules=["1"]),
    "LoKr": LoKr(r=2, alpha=2, use_effective_conv2d=True, decompose_factor=1, target_modules=["1"]),
    "LoKr, both": LoKr(r=1, decompose_both=True, decompose_factor=4, use_effective_conv2d=True, target_modules=["1"]),
    "LoKr, W2 whole": LoKr(r=4, alpha=2, use_effective_conv2d=True, target_modules=["1"]),
}
# HF PEFT takes the other product's core for the gradients of these, as LyCORIS does.
WRONG_THERE = ("hada_w1_a", "hada_w2_a")


def model_of(layer: Build) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Identity(), layer(), nn.Tanh()).double().eval()


def input_for(layer: Build) -> Tensor:
    shape = {1: (7,), 2: (5, 6)}[len(layer().kernel_size)]  # type: ignore[arg-type]
    return torch.randn(2, 4, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The gradients of the trained parameters, by the last part of their names."""
    model.zero_grad()
    model(x).square().sum().backward()
    return {
        name.removesuffix(".default").rpartition(".")[2]: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is not None
    }


@torch.no_grad()
def by_differences(parameter: Tensor, loss: Callable[[], Tensor]) -> Tensor:
    """The gradient of the loss, by central differences."""
    found, step = torch.empty_like(parameter), 1e-5
    for place in range(parameter.numel()):
        value = parameter.view(-1)[place].item()
        ends = []
        for end in (value + step, value - step):
            parameter.view(-1)[place] = end
            ends.append(loss())
        parameter.view(-1)[place] = value
        found.view(-1)[place] = (ends[0] - ends[1]) / (2 * step)
    return found


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max()


@pytest.mark.parametrize("name", [*LAYERS, *PADDED])
@pytest.mark.parametrize("kind", CORES)
def test_cores(kind: str, name: str, tmp_path: Path) -> None:
    """Outputs, gradients and the merge beside HF PEFT, from our file and from the one that it writes of it."""
    layer = {**LAYERS, **PADDED}[name]
    x, model = input_for(layer), model_of(layer)
    before, base = snapshot(model), model(x)
    inject(model, CORES[kind])
    assert torch.equal(model(x), base)
    strongly(model)
    tuned = model(x)
    assert (tuned - base).abs().max() > 1e-3
    save_adapter(model, tmp_path / "ours")
    if name not in PADDED and not fails_there(model):
        judge = peft.PeftModel.from_pretrained(
            model_of(layer), tmp_path / "ours", is_trainable=True, autocast_adapter_dtype=False
        ).eval()
        assert_near(tuned, judge(x))
        assert_same_gradients(model, judge, x)
        judge.save_pretrained(tmp_path / "theirs")
        loaded = model_of(layer)
        load_adapter(loaded, tmp_path / "theirs")
        assert torch.equal(loaded(x), tuned)
        merge(loaded, unload=True)
        for key, tensor in judge.merge_and_unload().state_dict().items():
            assert_near(loaded.state_dict()[key], tensor)
    assert not merge(model).kept
    assert_near(model(x), tuned)
    unmerge(model)
    assert torch.equal(model(x), tuned)
    # A signal without a batch around it.
    assert_near(model(x[0]), tuned[0])
    eject(model)
    assert_unchanged(model, before)


def fails_there(model: nn.Module) -> bool:
    """Whether HF PEFT cannot multiply these factors: torch.kron, which it calls, cannot view a core of rank 1 there."""
    cores = [p for name, p in model.named_parameters() if name.endswith("lokr_t2")]
    return any(core.shape[0] == core.shape[3] == 1 for core in cores)


def assert_same_gradients(model: nn.Module, judge: nn.Module, x: Tensor) -> None:
    ours, theirs = gradients(model, x), gradients(judge, x)
    assert ours.keys() == theirs.keys()
    assert ours
    for key in ours:
        if "hada_t1" in ours and key in WRONG_THERE:
            parameter = judge.get_parameter(f"base_model.model.1.{key}.default")
            theirs[key] = by_differences(parameter, lambda: judge(x).square().sum())
            assert (ours[key] - theirs[key]).abs().max() <= 1e-6 * theirs[key].abs().max()
        else:
            assert_near(ours[key], theirs[key])


@pytest.mark.parametrize(
    "config",
    [
        peft.LoHaConfig(r=2, target_modules=["1"], use_effective_conv2d=True),
        peft.LoKrConfig(r=1, target_modules=["1"], use_effective_conv2d=True, decompose_both=True, decompose_factor=4),
    ],
    ids=lambda config: type(config).__name__,
)
def test_cores_from_their_configuration(config: peft.PeftConfig, tmp_path: Path) -> None:
    """What is injected by a configuration has the tensors that HF PEFT writes by it."""
    layer = LAYERS["dilation"]
    x, judge = input_for(layer), peft.get_peft_model(model_of(layer), config, autocast_adapter_dtype=False)
    strongly(judge)
    judge.save_pretrained(tmp_path)
    model = model_of(layer)
    (method,), _ = from_peft_config(config)
    inject(model, method)
    load_adapter(model, tmp_path)
    assert_near(model(x), judge(x))


class Pair(nn.Module):
    """Two convolutions and a linear layer, of names that end alike."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.preconv = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.preconv(self.conv(x)).tanh().mean((2, 3)))


def pair() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Pair().double()


@pytest.mark.parametrize("inputs", [["conv"], ["preconv"], ["conv", "preconv"], ["head", "conv"], ["head"]])
def test_which_side_ia3_rescales(inputs: list[str], tmp_path: Path) -> None:
    """HF PEFT takes every name that ends so, and its vectors of both sides of a convolution have one shape."""
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model, loaded = pair(), pair()
    exactly = [f"re:{name}" for name in inputs]
    inject(model, IA3(target_modules=["re:conv", "preconv", "head"], feedforward_modules=exactly))
    strongly(model)
    save_adapter(model, tmp_path / "ours")
    judge = peft.PeftModel.from_pretrained(pair(), tmp_path / "ours", autocast_adapter_dtype=False)
    assert_near(model(x), judge(x))
    judge.save_pretrained(tmp_path / "theirs")
    load_adapter(loaded, tmp_path / "theirs")
    assert torch.equal(loaded(x), model(x))


def test_the_other_side_of_a_convolution_is_refused(tmp_path: Path) -> None:
    """What is loaded into a model in which the other side is rescaled, by a vector of the same shape."""
    model, other = pair(), pair()
    inject(model, IA3(target_modules=["preconv"]))
    save_adapter(model, tmp_path / "adapter")
    inject(other, IA3(target_modules=["preconv"], feedforward_modules=["preconv"]))
    with pytest.raises(PEFTError, match=r"preconv\.peft\.default\.ia3_l"):
        load_adapter(other, tmp_path / "adapter")
