"""Switching between resident adapters: what it costs, and that compiled programs stay."""

import copy
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import build, fill, outputs
from torch import Tensor, nn

from lightning_peft import (
    IA3,
    AdaLoRA,
    DoRA,
    LoHa,
    LoKr,
    LoRA,
    ParallelAdapter,
    PEFTError,
    PEFTMethod,
    SeriesAdapter,
    disable,
    eject,
    inject,
    merge,
    set_adapter,
    unmerge,
)

X = torch.linspace(-1, 1, 48).view(3, 16)


def mlp() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).eval()


def with_adapters(model: nn.Module, method: PEFTMethod, count: int) -> list[str]:
    names = [f"a{index}" for index in range(count)]
    for seed, name in enumerate(names):
        inject(model, method, name=name)
        fill(model, name, seed)
    return names


def alone(method: PEFTMethod, index: int) -> Tensor:
    """The outputs of a model that has this adapter alone."""
    model = mlp()
    inject(model, method)
    fill(model, "default", index)
    with torch.no_grad():
        return model(X)


TARGETS: dict[str, Any] = {"target_modules": ["0", "2"]}
METHODS: dict[str, PEFTMethod] = {
    "lora": LoRA(r=2, **TARGETS),
    "dora": DoRA(r=2, **TARGETS),
    "ia3": IA3(target_modules=["0", "2"], feedforward_modules=["2"]),
    "series": SeriesAdapter(bottleneck=2, train_norms=False, **TARGETS),
    "parallel": ParallelAdapter(bottleneck=2, **TARGETS),
}


@pytest.mark.parametrize("method", METHODS)
def test_compiled_programs_serve_every_adapter(method: str) -> None:
    """One program, without graph breaks, for 32 adapters, in inference and in training."""
    expected = [alone(METHODS[method], index) for index in range(32)]  # to inject is to forget what is compiled
    model = mlp()
    names = with_adapters(model, METHODS[method], 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(X)
    compiled(X)
    counts = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    seen = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for index in (*range(32), 5, 0):
            set_adapter(model, names[index])
            with torch.no_grad():
                seen.append(compiled(X))
            assert (seen[-1] - expected[index]).abs().max() <= 1e-5
            model.zero_grad()
            compiled(X).square().sum().backward()
            grads = {key for key, p in model.named_parameters() if p.grad is not None}
            assert grads
            assert all(f".peft.{names[index]}." in key for key in grads)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counts
    assert len({tuple(output.flatten().tolist()) for output in seen}) == 32


SCALED: dict[str, Callable[[int], PEFTMethod]] = {
    "lora": lambda alpha: LoRA(r=2, alpha=alpha, **TARGETS),
    "biased": lambda alpha: LoRA(r=2, alpha=alpha, lora_bias=True, **TARGETS),
    "pissa": lambda alpha: LoRA(r=2, alpha=alpha, init="pissa", **TARGETS),
    "dora": lambda alpha: DoRA(r=2, alpha=alpha, **TARGETS),
    "loha": lambda alpha: LoHa(r=2, alpha=alpha, **TARGETS),
    "lokr": lambda alpha: LoKr(r=2, alpha=alpha, **TARGETS),
    "adalora": lambda alpha: AdaLoRA(init_r=2, target_r=1, alpha=alpha, **TARGETS),
    "parallel": lambda alpha: ParallelAdapter(bottleneck=2, scale=alpha, **TARGETS),
}


@pytest.mark.parametrize("kind", SCALED)
def test_adapters_of_other_scales_cost_one_more_program(kind: str) -> None:
    """The second scale makes it a variable of the program, as torch does with numbers; a third compiles nothing."""
    model = mlp()
    alphas = {"default": 2, "second": 4, "third": 16, "fourth": 1}
    for name, alpha in alphas.items():
        inject(model, SCALED[kind](alpha), name=name)
        fill(model, name, alpha)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    seen = {}
    with torch.no_grad():
        for name in ("default", "second"):
            set_adapter(model, name)
            compiled(X)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for name in (*alphas, "default"):
                set_adapter(model, name)
                seen[name] = compiled(X)
                assert (seen[name] - model(X)).abs().max() <= 1e-5
    assert len({tuple(output.flatten().tolist()) for output in seen.values()}) == len(alphas)


def test_a_compiled_transformer_serves_every_adapter() -> None:
    model, inputs = build("llama")
    names = with_adapters(model, LoRA(r=2), 3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        outputs(compiled, inputs)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for name in (*names, names[0]):
                set_adapter(model, name)
                expected = outputs(model, inputs)
                assert (outputs(compiled, inputs) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_dropout_going_on_and_off_compiles_nothing_anew() -> None:
    """One program for training and one for evaluation, whatever adapter runs, and however often they take turns."""
    model = mlp()
    names = with_adapters(model, LoRA(r=2, dropout=0.5, **TARGETS), 2)
    expected = {name: None for name in names}
    for name in names:
        set_adapter(model, name)
        expected[name] = model.eval()(X)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for mode in (True, False):
        model.train(mode)
        compiled(X).square().sum().backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for turn in range(4):
            set_adapter(model, names[turn % 2])
            model.train()
            dropped = compiled(X)
            dropped.square().sum().backward()
            model.eval()
            kept = compiled(X)
            assert not torch.equal(dropped, kept)
            torch.testing.assert_close(kept, expected[names[turn % 2]])


def calls_of_switching(count: int, width: int) -> int:
    model = nn.ModuleList([nn.Linear(width, width) for _ in range(3)])
    names = with_adapters(model, LoRA(r=2, target_modules=["0", "1", "2"]), count)
    calls = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        set_adapter(model, names[1])
    finally:
        sys.setprofile(None)
    return calls


def test_switching_does_as_much_whatever_is_resident() -> None:
    assert calls_of_switching(2, 8) == calls_of_switching(32, 8) == calls_of_switching(2, 64)


def test_switching_leaves_what_requires_gradients_to_the_user() -> None:
    model = mlp()
    names = with_adapters(model, METHODS["lora"], 3)

    def training() -> set[str]:
        return {key.split(".")[2] for key, p in model.named_parameters() if p.requires_grad}

    assert training() == set(names)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and f".peft.{names[1]}." not in key)
    for name in (names[1], names[2], names[0]):
        set_adapter(model, name)
        assert training() == {names[0], names[2]}


def test_gradients_reach_what_runs_alone() -> None:
    model = mlp()
    names = with_adapters(model, METHODS["lora"], 2)
    set_adapter(model, names[1])
    model(X).square().sum().backward()
    assert {k.split(".")[2] for k, p in model.named_parameters() if p.grad is not None} == {names[1]}


def test_copies_switch_by_themselves() -> None:
    model = mlp()
    names = with_adapters(model, METHODS["lora"], 2)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        set_adapter(twin, names[1])
        assert torch.allclose(twin(X), alone(METHODS["lora"], 1), atol=1e-6)
        assert torch.allclose(model(X), alone(METHODS["lora"], 0), atol=1e-6)
        fill(twin, names[1], 0)
        assert torch.allclose(twin(X), alone(METHODS["lora"], 0), atol=1e-6)


def test_it_goes_with_merging_disabling_and_ejecting() -> None:
    model, base = mlp(), mlp()(X)
    names = with_adapters(model, METHODS["lora"], 2)
    set_adapter(model, names[1])
    merge(model)
    assert torch.allclose(model(X), alone(METHODS["lora"], 1), atol=1e-5)
    with pytest.raises(PEFTError, match=r"Cannot switch adapters.*merged"):
        set_adapter(model, names[0])
    unmerge(model)
    set_adapter(model, names[0])
    with disable(model):
        assert torch.equal(model(X), base)
        for action in (lambda: set_adapter(model, names[1]), lambda: merge(model), lambda: eject(model)):
            with pytest.raises(PEFTError, match=r"inside of `with disable"):
                action()
        with disable(model):
            assert torch.equal(model(X), base)
        assert torch.equal(model(X), base)
    assert torch.allclose(model(X), alone(METHODS["lora"], 0), atol=1e-6)
    eject(model)
    assert torch.equal(model(X), base)


def test_an_adapter_is_in_the_mode_of_its_host() -> None:
    model = mlp()
    inject(model, LoRA(r=2, dropout=0.5, **TARGETS))
    fill(model, "default", 0)
    assert torch.equal(model(X), model(X))
    model.train()
    assert not torch.equal(model(X), model(X))
