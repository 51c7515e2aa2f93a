"""`state_dict()` and `load_state_dict()` called by hand: outputs are those of the loaded state, or an error."""

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import build, outputs, randomise
from torch import Tensor, nn

from lightning_peft import (
    BitFit,
    Compacter,
    DoRA,
    LoRA,
    NewTokens,
    PEFTError,
    SeriesAdapter,
    VeRA,
    adapter_state_dict,
    eject,
    inject,
    merge,
    unmerge,
)
from lightning_peft.operations.merge import is_merged

State = dict[str, Tensor]
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def plain(seed: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def adapted(base: int, values: int = 0) -> nn.Sequential:
    """A model with LoRA, trained if ``values``, a seed, is given."""
    model = plain(base)
    inject(model, LoRA(r=2))
    if values:
        generator = torch.Generator().manual_seed(values)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return model


def copied(state: State) -> State:
    """As much code makes it: torch's own marks on a state are gone."""
    return {name: tensor.clone() for name, tensor in state.items()}


def merged(model: nn.Module) -> nn.Module:
    merge(model)
    return model


def formula(base: int, values: int) -> Tensor:
    """Outputs of :func:`adapted` in plain torch: W0 + (16 / 2) B A."""
    weights, model = adapted(base, values).state_dict(), plain(base)
    for layer in ("0", "2") if values else ():
        change = 8 * weights[f"{layer}.peft.default.lora_B"] @ weights[f"{layer}.peft.default.lora_A"]
        model.get_submodule(layer).weight.data += change
    return model(X).detach()


# The state of what, and the base and the adapter that it is about.
STATES: dict[str, tuple[Callable[[], State], int, int]] = {
    "plain": (lambda: plain(2).state_dict(), 2, 0),
    "merged": (lambda: merged(adapted(2, 5)).state_dict(), 2, 5),
    "unmerged": (lambda: adapted(2, 5).state_dict(), 2, 5),
    "adapter alone": (lambda: adapter_state_dict(adapted(1, 5)), 1, 5),
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: plain(1),
    "untrained": lambda: adapted(1),
    "untrained and merged": lambda: merged(adapted(1)),
    "trained": lambda: adapted(1, 6),
    "trained and merged": lambda: merged(adapted(1, 6)),
}
# A plain state into a trained or merged model would be added to, or forgotten by the next unmerge.
REFUSED = {*itertools.product(("plain", "merged"), ("untrained and merged", "trained", "trained and merged"))}
# Nothing of this package is left in a plain model: torch names the keys that it has no place for.
UNKNOWN_TO_TORCH = {("unmerged", "plain"), ("adapter alone", "plain")}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("into", MODELS)
@pytest.mark.parametrize("kind", STATES)
def test_outputs_are_those_of_the_state_or_it_is_refused(kind: str, into: str, strict: bool) -> None:
    make, base, values = STATES[kind]
    state, model = copied(make()), MODELS[into]()
    if (kind, into) in UNKNOWN_TO_TORCH:
        with pytest.raises(RuntimeError, match="Unexpected key"):
            model.load_state_dict(state)
        return
    before, was_merged = model(X), into.endswith("merged")
    if (kind, into) in REFUSED:
        with pytest.raises(PEFTError, match=r"weight for '0' and no adapters\. Here .* call eject\(model\)"):
            model.load_state_dict(state, strict=strict)
        assert torch.equal(model(X), before)
        return
    assert model.load_state_dict(state, strict=strict) == ([], [])
    assert (model(X) - formula(base, values)).abs().max() < 1e-5
    if into == "plain":
        return
    # It is what it was, and what it holds is what was loaded: also to be unmerged, saved and ejected.
    assert is_merged(model) == was_merged
    if kind in ("unmerged", "adapter alone"):
        for name, tensor in adapter_state_dict(model).items():
            assert torch.equal(tensor, state[name])
    unmerge(model)
    assert (model(X) - formula(base, values)).abs().max() < 1e-5
    eject(model)
    assert (model(X) - (formula(base, values) if kind == "merged" else plain(base)(X))).abs().max() < 1e-5


@pytest.mark.parametrize("into", MODELS)
def test_a_model_takes_its_own_state(into: str) -> None:
    model = MODELS[into]()
    before = model(X)
    state = copied(model.state_dict())
    assert model.load_state_dict(state) == ([], [])
    assert torch.equal(model(X), before)


def test_a_merged_model_has_the_state_of_a_plain_one() -> None:
    model = merged(adapted(1, 5))
    assert list(model.state_dict()) == list(plain(1).state_dict())
    assert len(adapter_state_dict(model)) == 4
    twin = plain(2)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(X), model(X))
    unmerge(model)
    assert len(model.state_dict()) == 8


def test_a_part_of_a_merged_model_is_loaded_alone() -> None:
    outer = nn.ModuleDict({"net": plain(1), "other": nn.Linear(2, 2)})
    inject(outer, LoRA(r=2, target_modules="net.*"))
    merge(outer)
    outer.net.load_state_dict(copied(adapted(2, 5).state_dict()))
    assert (outer.net(X) - formula(2, 5)).abs().max() < 1e-5
    outer.load_state_dict({"other.bias": torch.ones(2)}, strict=False)
    assert (outer.net(X) - formula(2, 5)).abs().max() < 1e-5


def test_a_state_that_was_taken_before_the_merge_and_not_copied() -> None:
    model = adapted(1, 5)
    state = model.state_dict()
    merge(model)
    model.load_state_dict(state)
    assert (model(X) - formula(1, 5)).abs().max() < 1e-5


@pytest.mark.parametrize("was_merged", [True, False])
def test_values_can_be_assigned(was_merged: bool) -> None:
    model = adapted(1, 6)
    if was_merged:
        merge(model)
    model.load_state_dict(copied(adapted(2, 5).state_dict()), assign=True)
    assert (model(X) - formula(2, 5)).abs().max() < 1e-5
    unmerge(model)
    assert (model(X) - formula(2, 5)).abs().max() < 1e-5


@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), lambda model: reloaded(model)]
)
def test_copies_keep_to_it_and_to_themselves(copy_of: Callable[[nn.Module], nn.Module]) -> None:
    original = merged(adapted(1, 6))
    twin = copy_of(original)
    twin.load_state_dict(copied(adapted(2, 5).state_dict()))
    assert (twin(X) - formula(2, 5)).abs().max() < 1e-5
    assert (original(X) - formula(1, 6)).abs().max() < 1e-5
    eject(twin)
    untouched = plain(1)
    for module, judge in zip(twin.modules(), untouched.modules(), strict=True):
        assert len(module._load_state_dict_pre_hooks) == len(judge._load_state_dict_pre_hooks) == 0
    merge(original, unload=True)
    assert not any(module._load_state_dict_pre_hooks for module in original.modules())


def reloaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)  # type: ignore[no-any-return]


def test_a_compiled_part_takes_adapter_state_by_its_clean_names() -> None:
    outer = nn.ModuleDict({"net": plain(1)})
    inject(outer, LoRA(r=2))
    outer["net"] = torch.compile(outer.net, backend="eager")  # type: ignore[assignment]
    state = {f"net.{name}": tensor for name, tensor in adapter_state_dict(adapted(1, 5)).items()}
    for _ in range(2):
        outer.load_state_dict(state)
        assert (outer.net(X) - formula(1, 5)).abs().max() < 1e-5
        merge(outer)


@pytest.mark.parametrize("keep", ["lora_A", "lora_B"])
def test_a_lacking_adapter_tensor_is_named(keep: str) -> None:
    state = {name: tensor for name, tensor in adapter_state_dict(adapted(1, 5)).items() if keep in name}
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.peft\.default\.lora_"):
        adapted(1).load_state_dict(state)


@pytest.mark.parametrize("into", ["trained", "trained and merged"])
def test_a_misshapen_tensor_is_named(into: str) -> None:
    state = {**copied(adapted(1, 5).state_dict()), "0.peft.default.lora_A": torch.ones(3, 8)}
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.peft\.default\.lora_A"):
        MODELS[into]().load_state_dict(state)


METHODS: dict[str, Callable[[], Any]] = {
    "BitFit with biases of its own": lambda: BitFit(create_missing=True),
    "DoRA": lambda: DoRA(r=2),
    "VeRA": lambda: VeRA(r=4),
    "LoRA on a tied embedding": lambda: LoRA(r=2, target_modules=["embed_tokens", "q_proj"]),
    "NewTokens": lambda: NewTokens(token_indices=[3, 5]),
    "Compacter": Compacter,
    "SeriesAdapter": SeriesAdapter,
    "LoRA and a layer trained whole": lambda: LoRA(r=2, target_modules="q_proj"),
}


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("was_merged", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_every_kind_of_adapter(name: str, was_merged: bool, alone: bool) -> None:
    """Gemma's head and embedding are one weight, and its layers have no biases."""
    options = {"train_also": ["layers.1.mlp"]} if "whole" in name else {}
    (source, inputs), (model, _) = build("gemma3"), build("gemma3")
    for found in (source, model):
        inject(found, METHODS[name](), **options)
    randomise(source)
    for parameter in source.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter) if parameter.requires_grad else 0
    expected = outputs(source, inputs)
    state = copied(adapter_state_dict(source) if alone else source.state_dict())
    if was_merged:
        merge(model)
    assert (outputs(model, inputs) - expected).abs().max() > 1e-3
    assert model.load_state_dict(state) == ([], [])
    assert (outputs(model, inputs) - expected).abs().max() <= 3e-5
    assert is_merged(model) == (was_merged and name not in ("Compacter", "SeriesAdapter"))
    unmerge(model)
    assert (outputs(model, inputs) - expected).abs().max() <= 3e-5


def test_one_weight_of_two_hosts_is_merged_anew_once() -> None:
    """From the state of another base, in which the weight has one of its two names."""
    (source, inputs), (model, _) = build("gemma3"), build("gemma3")
    for found in (source, model):
        inject(found, METHODS["NewTokens"]())
    randomise(source)
    with torch.no_grad():
        source.model.embed_tokens.weight.mul_(1.5)
    expected = outputs(source, inputs)
    merge(model)
    state = copied(source.state_dict())
    del state["lm_head.weight"]
    model.load_state_dict(state)
    assert (outputs(model, inputs) - expected).abs().max() <= 1e-5
    unmerge(model)
    assert (outputs(model, inputs) - expected).abs().max() <= 1e-5


def test_a_state_of_untied_weights_into_tied_ones() -> None:
    """Torch would take the head's old value for both."""
    source, model = build("gemma3")[0], build("gemma3")[0]
    for found in (source, model):
        inject(found, METHODS["LoRA on a tied embedding"]())
    randomise(source)
    merge(source)
    with pytest.raises(PEFTError, match=r"'model\.embed_tokens\.weight' and another for 'lm_head\.weight'.*untied"):
        model.load_state_dict(copied(source.state_dict()))
    source.load_state_dict(copied(source.state_dict()))


@pytest.mark.parametrize(
    ("method", "exact"),
    [(lambda: LoRA(r=2, init="pissa"), True), (METHODS["DoRA"], False), (METHODS["NewTokens"], False)],
)
def test_a_base_under_untrained_adapters(method: Callable[[], Any], exact: bool) -> None:
    """Some hold values of the base that they were made for."""
    (model, inputs), (twin, _) = build("gemma3"), build("gemma3")
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    inject(model, method())
    if exact:
        model.load_state_dict(twin.state_dict())
        assert torch.equal(outputs(model, inputs), outputs(twin, inputs))
    else:
        with pytest.raises(PEFTError, match="would change what it computes"):
            model.load_state_dict(twin.state_dict())


def test_adapters_that_are_never_in_weights_stay_beside_a_plain_state() -> None:
    """Which lacks their keys: torch says so, and loads the rest if it is asked to."""
    model, twin = plain(1), plain(2)
    inject(model, SeriesAdapter(target_modules=["0"], bottleneck=2))
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.peft"):
        model.load_state_dict(twin.state_dict())
    missing, _ = model.load_state_dict(twin.state_dict(), strict=False)
    assert missing
    assert all(".peft." in key for key in missing)
