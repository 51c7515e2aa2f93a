"""Every method on every family: the whole life of an adapter. What makes no sense is refused, with a reason."""

import copy
import dataclasses
import inspect
import pickle
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from all_methods import FAMILY, METHODS, OURS, REFUSED
from families import ALL_FAMILIES, FAMILIES, build, outputs, randomise
from modules import assert_same
from resuming import SteppedLlama, logits, straight_and_resumed
from torch import Tensor, nn
from unchanged import assert_unchanged, snapshot

import lightning_peft
from lightning_peft import (
    AdaLoRA,
    BitFit,
    NewTokens,
    PEFTError,
    PEFTMethod,
    SeriesAdapter,
    adapter_state_dict,
    eject,
    inject,
    load_adapter,
    merge,
    methods,
    save_adapter,
    unmerge,
)
from lightning_peft.core.view import ModelView
from lightning_peft.storage.state import load_adapter_state_dict

# torch has another kernel for models without gradients and hooks.
ROUNDING = {"torch_encoder": 1e-6, "torch_decoder": 1e-6}
# How far from the base model's outputs a method starts, where it is not the identity.
START = {
    "series_adapter": 0.1,
    "series_adapter of pfeiffer": 0.1,
    "series_adapter before the mlp": 0.1,
    "compacter": 0.1,
    # A prefix is attended to, whatever it is.
    "prefix_tuning": 0.6,
    "prefix_tuning with an mlp": 0.6,
    "prefix_tuning and parallel_adapter": 0.6,
    "prompt_tuning": 1.0,
    "prompt_tuning with infix tokens": 1.0,
    "prompt_tuning in every layer": 1.0,
}

# A method of each kind, which lives on every family in `make test` too.
OF_EACH_KIND = ("lora", "dora", "series_adapter", "parallel_adapter", "prefix_tuning", "ia3", "bitfit")


def lives() -> list[Any]:
    """Every method on every family; those of other methods on families beside the main ones are slow."""
    return [
        pytest.param(name, family, marks=() if family in FAMILIES or name in OF_EACH_KIND else pytest.mark.slow)
        for name in METHODS
        for family in ALL_FAMILIES
    ]


def loss_of(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    result = outputs(model, inputs)
    return (result - torch.linspace(-1, 1, result.numel()).view_as(result)).square().mean()


def evaluate(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return outputs(model, inputs)


def partly_frozen(family: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model of which the user froze something."""
    model, inputs = build(family)
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 5 != 0)
    return model, inputs


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train(model: nn.Module, inputs: dict[str, Any], steps: int = 6) -> list[float]:
    optimizer, losses = torch.optim.Adam(trained(model).values(), lr=1e-4), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, inputs)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return [*losses, loss_of(model, inputs).item()]


def perturb(model: nn.Module) -> None:
    """Move what is trained so far that a tensor which is lost or ignored shows in the outputs."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in trained(model).items():
            width = 0.3 if ".peft." in name else 0.05
            parameter.add_(torch.randn(parameter.shape, generator=generator) * width)


@cache
def without_gradient(family: str) -> set[str]:
    """Parameters of the base that its outputs do not depend on."""
    model, inputs = build(family)
    model.requires_grad_(True)
    loss_of(model, inputs).backward()
    return {name for name, p in model.named_parameters() if p.grad is None}


@pytest.mark.parametrize(("name", "family"), lives())
def test_life_cycle(name: str, family: str, tmp_path: Path) -> None:
    method, (model, inputs) = METHODS[name], partly_frozen(family)
    before, expected = snapshot(model), evaluate(model, inputs)
    if (name, family) in REFUSED:
        with pytest.raises(PEFTError, match=REFUSED[name, family]):
            inject(model, method)
        assert_unchanged(model, before)
        return

    stream = torch.get_rng_state()
    assert inject(model, method, seed=3)
    assert torch.equal(torch.get_rng_state(), stream)
    start = evaluate(model, inputs)
    assert torch.equal(start, expected) or (start - expected).abs().max() < START.get(name, ROUNDING.get(family, 0.0))
    assert before["state"].keys() <= model.state_dict().keys()

    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    declared = adapter_state_dict(model).keys() & {n for n, _ in model.named_parameters()}
    losses = train(model, inputs)
    assert losses[-1] < losses[0]
    assert trained(model).keys() == declared
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == declared - without_gradient(family)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    perturb(model)
    tuned = evaluate(model, inputs)
    effect, scale = (tuned - start).abs().max(), tuned.abs().max().clamp(min=1.0)
    assert effect > 1e-5

    save_adapter(model, tmp_path / "adapter")
    fresh = partly_frozen(family)[0]
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(evaluate(fresh, inputs), tuned)
    state = {key: tensor.clone() for key, tensor in adapter_state_dict(model).items()}
    randomise(model)
    load_adapter_state_dict(ModelView(model), state)
    assert torch.equal(evaluate(model, inputs), tuned)

    report = merge(model)
    assert_same(dict(adapter_state_dict(model)), state)
    if report.kept:
        assert "stay attached" in str(report)
        with pytest.raises(PEFTError, match="cannot be merged"):
            merge(model, unload=True)
    assert (evaluate(model, inputs) - tuned).abs().max() <= max(0.01 * effect, 2e-6 * scale)
    unmerge(model)
    assert torch.equal(evaluate(model, inputs), tuned)
    eject(model)
    assert torch.equal(evaluate(model, inputs), expected)
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", METHODS)
def test_copies_and_pickles(name: str) -> None:
    model, inputs = build(FAMILY.get(name, "opt"))
    base = outputs(model, inputs)
    inject(model, METHODS[name])
    train(model, inputs)
    expected, state = outputs(model, inputs), dict(adapter_state_dict(model))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(twin, inputs), expected)
        assert_same(dict(adapter_state_dict(twin)), state)
        eject(twin)
        assert torch.equal(outputs(twin, inputs), base)
        assert torch.equal(outputs(model, inputs), expected)


@pytest.mark.parametrize("name", METHODS)
def test_bfloat16(name: str) -> None:
    model, inputs = build(FAMILY.get(name, "opt"))
    model.to(torch.bfloat16)
    inject(model, METHODS[name])
    model.to(torch.bfloat16)
    adapters = {p.dtype for n, p in trained(model).items() if ".peft." in n}
    assert adapters <= {torch.float32}
    assert outputs(model, inputs).dtype == torch.bfloat16
    loss_of(model, inputs).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained(model).values())


@pytest.mark.parametrize("name", METHODS)
def test_a_second_injection_is_refused_or_does_nothing(name: str) -> None:
    model, inputs = build(FAMILY.get(name, "opt"))
    first = inject(model, METHODS[name])
    before, names = outputs(model, inputs), [n for n, _ in model.named_parameters()]
    assert inject(model, METHODS[name]) == first
    with pytest.raises(PEFTError, match="already has an adapter"):
        inject(model, SeriesAdapter(bottleneck=3))
    assert [n for n, _ in model.named_parameters()] == names
    assert torch.equal(outputs(model, inputs), before)


@pytest.mark.parametrize("name", METHODS)
def test_a_merge_without_loss_of_the_effect(name: str) -> None:
    """What merges leaves a plain model with the same outputs, which a state dict carries into a fresh one."""
    model, inputs = build(FAMILY.get(name, "opt"))
    inject(model, METHODS[name])
    train(model, inputs)
    expected = outputs(model, inputs)
    if merge(model).kept:
        return
    merge(model, unload=True)
    assert not any(".peft." in key for key in model.state_dict())
    plain = build(FAMILY.get(name, "opt"))[0]
    missing, _ = plain.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    assert (outputs(model, inputs) - expected).abs().max() <= 1e-5


RUNS = [*OURS, "prefix_tuning with an mlp", "prefix_tuning and parallel_adapter"]
STRATEGY: dict[str, PEFTMethod] = {
    "bitfit": BitFit(create_missing=True),
    "adalora": AdaLoRA(init_r=6, target_r=3, tfinal=1),
    "new_tokens": NewTokens(token_indices=list(range(32))),
}


@pytest.mark.parametrize("name", RUNS)
def test_fit_resume_and_merge(name: str, tmp_path: Path) -> None:
    method = STRATEGY.get(name) or METHODS[name]
    straight, resumed = straight_and_resumed(tmp_path, SteppedLlama, method)
    assert_same(adapter_state_dict(straight), adapter_state_dict(resumed))
    base = logits(SteppedLlama())
    assert not torch.equal(logits(straight), base)
    merged = logits(straight)
    unmerge(straight)
    assert (logits(straight) - merged).abs().max() <= 1e-5
    loaded = SteppedLlama()
    load_adapter(loaded, tmp_path / "straight" / "last")
    assert torch.equal(logits(loaded), logits(straight))
    loaded = SteppedLlama.load_from_checkpoint(tmp_path / "straight" / "last")
    assert torch.equal(logits(loaded), logits(straight))


def test_every_method_is_exported() -> None:
    missing = {cls.__name__ for cls in OURS.values()} - set(methods.__all__)
    assert not missing, f"Export {missing} in lightning_peft/methods/__init__.py."
    assert set(methods.__all__) <= set(lightning_peft.__all__)
    assert len(methods.__all__) == len(OURS)


@pytest.mark.parametrize("name", OURS)
def test_every_hyper_parameter_has_a_default_and_a_line(name: str) -> None:
    cls = OURS[name]
    method = cls()
    assert method == type(method)(**{k: v for k, v in method.config().items() if k != "method"})
    for key in dataclasses.fields(cls):  # type: ignore[arg-type]
        assert f"\n    {key.name}: " in inspect.cleandoc(cls.__doc__ or ""), key.name
