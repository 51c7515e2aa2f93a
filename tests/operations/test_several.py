"""Two adapters on one model, through every operation: what runs is the formula, and the other one is left alone."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import pytest
import torch
from families import build
from torch import Tensor, nn

from lightning_peft import (
    IA3,
    LoRA,
    PEFTMethod,
    adapter_names,
    combine,
    disable,
    eject,
    inject,
    load_adapter,
    merge,
    save_adapter,
    set_adapter,
    unmerge,
)

METHODS: dict[str, PEFTMethod] = {
    "lora": LoRA(r=2, alpha=6),
    "lora on one layer": LoRA(r=3, alpha=3, target_modules=["2"]),
    "ia3": IA3(target_modules=["0"], feedforward_modules=[]),
}
X = torch.linspace(-1, 1, 40).view(5, 8).sin()
Tensors = dict[str, Tensor]


def formula(method: PEFTMethod | None, adapter: Tensors) -> Tensor:
    """Compute the model with one adapter in float64, from the definitions of the papers."""
    base, x = build("sequential")[0].double(), X.double()
    for layer in ("0", "2"):
        linear = base.get_submodule(layer)
        own = {key.rpartition(".")[2]: value.double() for key, value in adapter.items() if key.startswith(f"{layer}.")}
        y = linear(x)
        if isinstance(method, LoRA) and own:
            y = y + method.alpha / method.r * (x @ own["lora_A"].T @ own["lora_B"].T)
        elif own:
            y = y * own["ia3_l"].flatten()
        x = y.relu() if layer == "0" else y
    return x.detach()


def drawn(model: nn.Module, name: str, seed: int) -> Tensors:
    """Give an adapter values that matter, and return copies of them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".peft.{name}." in key:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return tensors(model, name)


def tensors(model: nn.Module, name: str) -> Tensors:
    return {key: p.detach().clone() for key, p in model.named_parameters() if f".peft.{name}." in key}


@dataclass
class Two:
    """A model with the adapters ``one``, which runs, and ``two``."""

    model: nn.Module
    values: dict[str, Tensors]
    directory: Path


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(X)


def merge_both(two: Two) -> None:
    merge(two.model)
    unmerge(two.model)
    set_adapter(two.model, "two")
    merge(two.model)


def load_back(two: Two) -> None:
    """Save one, overwrite it, and load it."""
    save_adapter(two.model, two.directory / "one", name="one")
    drawn(two.model, "one", seed=9)
    load_adapter(two.model, two.directory / "one", name="one")


def load_third(two: Two) -> None:
    save_adapter(two.model, two.directory / "two", name="two")
    load_adapter(two.model, two.directory / "two", name="three")
    set_adapter(two.model, "three")


def without_any(two: Two) -> None:
    with disable(two.model):
        assert (outputs(two.model) - formula(None, {})).abs().max() < 1e-5


def rows(two: Two) -> None:
    whole = outputs(two.model)
    with adapter_names(two.model, ["two", "one", "", "two", "one"]):
        mixed = outputs(two.model)
    assert (mixed[[1, 4]] - whole[[1, 4]]).abs().max() < 1e-5
    assert (mixed[2] - formula(None, {})[2]).abs().max() < 1e-5
    set_adapter(two.model, "two")
    assert (mixed[[0, 3]] - outputs(two.model)[[0, 3]]).abs().max() < 1e-5
    set_adapter(two.model, "one")


# By name: what is done, and the adapter whose formula the model computes afterwards.
OPERATIONS: dict[str, tuple[Callable[[Two], object], str]] = {
    "nothing": (lambda two: None, "one"),
    "inject a third": (lambda two: inject(two.model, LoRA(r=1), name="three"), "one"),
    "switch": (lambda two: set_adapter(two.model, "two"), "two"),
    "switch back": (lambda two: [set_adapter(two.model, name) for name in ("two", "one")], "one"),
    "merge": (lambda two: merge(two.model), "one"),
    "merge the other": (merge_both, "two"),
    "merge for a while": (lambda two: [merge(two.model), unmerge(two.model)], "one"),
    "save and load": (load_back, "one"),
    "load the other as a third": (load_third, "two"),
    "disable": (without_any, "one"),
    "rows": (rows, "one"),
}


def made(one: str, two: str, directory: Path) -> Two:
    model = build("sequential")[0]
    values = {}
    for seed, (name, method) in enumerate({"one": one, "two": two}.items()):
        inject(model, METHODS[method], name=name)
        values[name] = drawn(model, name, seed)
    return Two(model, values, directory)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("pair", list(permutations(METHODS, 2)), ids=" and ".join)
def test_what_runs_is_the_formula_and_both_keep_their_values(
    pair: tuple[str, str], operation: str, tmp_path: Path
) -> None:
    two = made(*pair, tmp_path)
    parameters = dict(two.model.named_parameters())
    do, runs = OPERATIONS[operation]
    do(two)
    method = METHODS[pair[runs == "two"]]
    assert (outputs(two.model) - formula(method, two.values[runs])).abs().max() < 1e-4
    for name, values in two.values.items():
        after = tensors(two.model, name)
        assert after.keys() == values.keys()
        assert all(torch.equal(after[key], values[key]) for key in values), name
    left = dict(two.model.named_parameters())
    assert all(left[key] is parameter for key, parameter in parameters.items())


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_file_holds_the_adapter_that_was_asked_for(name: str, tmp_path: Path) -> None:
    two = made("lora", "lora on one layer", tmp_path)
    save_adapter(two.model, tmp_path / "it", name=name)
    fresh = build("sequential")[0]
    load_adapter(fresh, tmp_path / "it")
    method = METHODS["lora" if name == "one" else "lora on one layer"]
    assert (outputs(fresh) - formula(method, two.values[name])).abs().max() < 1e-5


@pytest.mark.parametrize("runs", ["one", "two"])
@pytest.mark.parametrize("way", ["eject", "unload"])
def test_in_the_end_nothing_of_either_is_left(way: str, runs: str, tmp_path: Path) -> None:
    two = made("lora", "ia3", tmp_path)
    set_adapter(two.model, runs)
    if way == "eject":
        eject(two.model)
        assert torch.equal(outputs(two.model), outputs(build("sequential")[0]))
    else:
        merge(two.model, unload=True)
        method = METHODS["lora" if runs == "one" else "ia3"]
        assert (outputs(two.model) - formula(method, two.values[runs])).abs().max() < 1e-4
    assert list(two.model.state_dict()) == list(build("sequential")[0].state_dict())


def test_a_combination_takes_nothing_from_its_parts(tmp_path: Path) -> None:
    two = made("lora", "lora on one layer", tmp_path)
    combine(two.model, ["one", "two"], [1.0, 1.0], "both")
    for name, values in two.values.items():
        assert all(torch.equal(value, values[key]) for key, value in tensors(two.model, name).items())
    set_adapter(two.model, "both")
    base = build("sequential")[0].double()
    for name, method in {"one": "lora", "two": "lora on one layer"}.items():
        for layer in ("0", "2"):
            own = {k.rpartition(".")[2]: v.double() for k, v in two.values[name].items() if k.startswith(f"{layer}.")}
            if own:
                scale = METHODS[method].alpha / METHODS[method].r  # type: ignore[attr-defined]
                base.get_submodule(layer).weight.data += scale * own["lora_B"] @ own["lora_A"]  # type: ignore[operator]
    assert (outputs(two.model) - base(X.double())).abs().max() < 1e-4
