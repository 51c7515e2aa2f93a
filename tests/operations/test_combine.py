"""New adapters made of several: HF PEFT's ``add_weighted_adapter`` and the formulas in float64 as judges."""

from pathlib import Path
from typing import Any

import peft
import peft.utils.merge_utils
import pytest
import torch
from families import build, fill, outputs
from judges.hf_peft import judge_of
from torch import Tensor, nn
from unchanged import assert_unchanged, snapshot

from lightning_peft import (
    BitFit,
    DoRA,
    LoRA,
    PEFTError,
    combine,
    disable,
    inject,
    load_adapter,
    merge,
    save_adapter,
    set_adapter,
)
from lightning_peft.adapters.low_rank import combination

TARGETS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn", "c_fc"], "gemma3": ["embed_tokens", "q_proj"]}
WEIGHTS = [0.7, -1.3, 0.5]
DENSITY = 0.6
SPARSE = ["magnitude_prune", "ties", "dare_linear", "dare_ties"]
METHODS = ["cat", "svd", "linear", *SPARSE, *(f"{method}_svd" for method in SPARSE)]


def adapted(family: str, ranks: tuple[int, ...] = (3, 3, 3), **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A model with LoRAs "a", "b", "c" of different scales; "c" leaves the last of the targets alone."""
    model, inputs = build(family)
    targets = TARGETS[family]
    for seed, (name, r) in enumerate(zip("abc", ranks, strict=True)):
        lora = LoRA(r=r, alpha=4 + 3 * seed, target_modules=targets[:-1] if name == "c" else targets, **options)
        inject(model, lora, name=name)
        fill(model, name, seed)
    return model, inputs


def changes(model: nn.Module, name: str) -> dict[str, Tensor]:
    """ΔW ``[out, in]`` by module, in float64."""
    found = {}
    for key, host in model.named_modules():
        slot = host._modules.get("peft")
        if slot is not None and name in slot:
            adapter = slot[name]
            found[key] = adapter.scale * torch.einsum("or,ri->oi", adapter.lora_B.double(), adapter.lora_A.double())
    return found


def weighted(model: nn.Module) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for name, weight in zip("abc", WEIGHTS, strict=True):
        for host, change in changes(model, name).items():
            total[host] = total.get(host, 0) + weight * change
    return total


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[host] - expected[host]).abs().max() / expected[host].abs().max()) for host in expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", TARGETS)
def test_results_are_pefts(family: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = adapted(family)
    judge = judge_of(model, family, tmp_path)
    before = outputs(model, inputs)
    options: dict[str, Any] = {} if method in ("cat", "svd", "linear") else {"density": DENSITY}

    # What DARE drops is random: peft is given the masks that were drawn here.
    masks, drop = [], combination._dropped

    def keeping(tensor: Tensor, *args: Any) -> Tensor:
        masks.append(drop(torch.ones_like(tensor), *args))
        return tensor * masks[-1]

    monkeypatch.setattr(combination, "_dropped", keeping)
    hosts = combine(model, list("abc"), WEIGHTS, "new", method=method, **options)

    def theirs(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        mask = masks.pop(0)
        # Beside Conv1D and embeddings peft keeps ΔW as the weight is kept.
        return tensor * (mask if mask.shape == tensor.shape else mask.T)

    monkeypatch.setattr(peft.utils.merge_utils, "random_pruning", theirs)
    judge.add_weighted_adapter(list("abc"), WEIGHTS, "new", combination_type=method, **options)
    judge.set_adapter("new")
    assert not masks

    assert torch.equal(outputs(model, inputs), before)
    set_adapter(model, "new")
    expected = outputs(judge, inputs)
    assert (outputs(model, inputs) - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert (outputs(model, inputs) - before).abs().max() > 1e-2
    layers = {name: module for name, module in judge.base_model.model.named_modules() if hasattr(module, "lora_A")}
    deltas = {name: module.get_delta_weight("new").detach() for name, module in layers.items()}
    ours = changes(model, "new")
    assert list(ours) == hosts
    assert ours.keys() == deltas.keys()
    for name, delta in deltas.items():
        delta = delta if delta.shape == ours[name].shape else delta.T
        assert (ours[name] - delta).abs().max() <= 2e-5 * delta.abs().max(), name


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("ranks", [(3, 3, 3), (2, 5, 1)])
def test_cat_and_svd_are_the_weighted_sum(family: str, ranks: tuple[int, ...]) -> None:
    model, _ = adapted(family, ranks, alpha_pattern={TARGETS[family][0]: 5.0})
    expected = weighted(model)
    combine(model, list("abc"), WEIGHTS, "cat")
    assert difference(changes(model, "cat"), expected) < 1e-5
    combine(model, list("abc"), WEIGHTS, "whole", method="svd", rank=sum(ranks))
    assert difference(changes(model, "whole"), expected) < 1e-5
    combine(model, list("abc"), WEIGHTS, "cut", method="svd", rank=2)
    nearest = {}
    for host, change in expected.items():
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        nearest[host] = (u[:, :2] * s[:2]) @ v[:2]
    assert difference(changes(model, "cut"), nearest) < 1e-5
    assert difference(changes(model, "cut"), expected) > 1e-2


def test_rslora_is_combined_at_its_own_scale() -> None:
    model, _ = adapted("llama", use_rslora=True)
    expected = weighted(model)
    combine(model, list("abc"), WEIGHTS, "new")
    assert difference(changes(model, "new"), expected) < 1e-5


def test_ranks_are_those_of_the_module_not_of_one_with_a_longer_name() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    inject(model, LoRA(r=2), name="a")
    inject(model, LoRA(r=1, target_modules=["1.0", "1.1"]), name="b")
    fill(model, "a", 0)
    fill(model, "b", 1)
    assert combine(model, ["a", "b"], [1.0, 1.0], "new") == ["0", "1.0", "1.1"]
    ranks = [len(host.peft["new"].lora_A) for host in (model[0], *model[1])]
    assert ranks == [2, 3, 3]


def test_cat_beyond_the_rank_of_the_matrix_stays_exact() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    for seed, name in enumerate("abc"):
        inject(model, LoRA(r=3), name=name)
        fill(model, name, seed)
    combine(model, list("abc"), WEIGHTS, "new")
    assert model[0].peft["new"].lora_A.shape == (4, 6)
    assert difference(changes(model, "new"), weighted(model)) < 1e-5


def test_ties_by_the_paper() -> None:
    """Trim to the largest, elect the sign by the sum, average those that agree: on ΔW, with weights of 1."""
    model, _ = adapted("llama")
    combine(model, list("abc"), [1, 1, 1], "new", method="ties_svd", density=0.2, rank=32)
    terms = [changes(model, name) for name in "abc"]
    for host, found in changes(model, "new").items():
        trimmed = []
        for change in (term[host] for term in terms if host in term):
            smallest = change.abs().flatten().sort(descending=True).values[int(0.2 * change.numel()) - 1]
            trimmed.append(torch.where(change.abs() >= smallest * (1 - 1e-12), change, 0.0))
        for i, j in ((0, 0), (3, 5), *torch.nonzero(found.abs() > 1e-4).tolist()):
            column = [float(change[i, j]) for change in trimmed]
            sign = 1 if sum(column) >= 0 else -1
            agreeing = [value for value in column if value * sign > 0]
            expected = sum(agreeing) / max(len(agreeing), 1)
            assert abs(found[i, j] - expected) < 1e-5


def test_dare_keeps_the_expected_value_and_depends_on_the_seed() -> None:
    model = nn.Sequential(nn.Linear(100, 200))
    inject(model, LoRA(r=16), name="a")
    fill(model, "a", 0)
    stream = torch.get_rng_state()
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        combine(model, ["a"], [1.0], name, method="dare_linear", density=0.25, seed=seed)
    assert torch.equal(torch.get_rng_state(), stream)
    one, again, two = (model[0].peft[name].lora_B for name in ("one", "again", "two"))
    assert torch.equal(one, again)
    assert not torch.equal(one, two)
    kept = one != 0
    assert abs(kept.double().mean() - 0.25) < 0.02
    ratio = (one / model[0].peft["a"].lora_B)[kept]
    assert torch.allclose(ratio, torch.full_like(ratio, 4.0), rtol=1e-5)


def test_it_is_a_lora_like_any_other(tmp_path: Path) -> None:
    model, inputs = adapted("gemma3", (2, 5, 1), dropout=0.1)
    combine(model, list("abc"), WEIGHTS, "new")
    set_adapter(model, "new")
    expected = outputs(model, inputs)
    assert all(p.requires_grad == (".peft." in name) for name, p in model.named_parameters())
    save_adapter(model, tmp_path / "new", name="new")
    judge = peft.PeftModel.from_pretrained(build("gemma3")[0], tmp_path / "new").eval()
    assert (outputs(judge, inputs) - expected).abs().max() <= 1e-5
    fresh = build("gemma3")[0]
    load_adapter(fresh, tmp_path / "new")
    assert (outputs(fresh, inputs) - expected).abs().max() <= 1e-6
    combine(model, ["new", "a"], [1.0, -1.0], "newer")
    set_adapter(model, "a")
    merge(model)
    with pytest.raises(PEFTError, match=r"Cannot inject.*unmerge"):
        combine(model, ["a"], [1.0], "other")


def test_adapters_on_different_modules() -> None:
    model, _ = build("llama")
    inject(model, LoRA(r=2, target_modules=["q_proj"]), name="a")
    inject(model, LoRA(r=2, target_modules=["layers.1.mlp.up_proj"]), name="b")
    fill(model, "a", 0)
    fill(model, "b", 1)
    hosts = combine(model, ["a", "b"], [2.0, 3.0], "new", method="linear")
    assert hosts == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    ]
    expected = {host: 2 * change for host, change in changes(model, "a").items()}
    expected.update({host: 3 * change for host, change in changes(model, "b").items()})
    assert difference(changes(model, "new"), expected) < 1e-5


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"adapters": ["a", "x"]}, "There is no adapter 'x'. Adapters: a, b, c, d"),
    "a string": ({"adapters": "ab"}, "'ab' was given; a list"),
    "none": ({"adapters": [], "weights": []}, r"\[\] was given; a list"),
    "no LoRA": ({"adapters": ["a", "d"]}, "'d' is a DoRA; only LoRAs"),
    "lengths": ({"weights": [1.0]}, "a finite number for each of a, b"),
    "infinity": ({"weights": [1.0, float("inf")]}, "a finite number"),
    "name": ({"name": "c"}, "already has an adapter 'c'"),
    "no name": ({"name": "x.y"}, "'x.y' was given; letters"),
    "method": ({"method": "mean"}, "'mean' was given; it is one of cat, svd"),
    "rank": ({"rank": 2}, "rank=2 was given with method='cat'"),
    "no rank": ({"rank": 0, "method": "svd"}, "rank=0 was given"),
    "density": ({"density": 0.5}, "density=0.5 was given with method='cat'; none"),
    "no density": ({"method": "ties"}, "density=None was given with method='ties'; a number"),
    "zero": ({"method": "dare_linear", "density": 0.0}, "density=0.0 was given"),
    "ranks": ({"method": "linear"}, "have the ranks 2, 3, but 'linear' adds"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_changes_nothing(case: str) -> None:
    options, message = BAD[case]
    model, _ = adapted("llama", (2, 3, 1))
    inject(model, DoRA(r=2), name="d")
    before = snapshot(model)
    with pytest.raises(PEFTError, match=message):
        combine(model, **{"adapters": ["a", "b"], "weights": [1.0, 2.0], "name": "new", **options})
    assert_unchanged(model, before)


def test_refused_by_its_state() -> None:
    model, _ = build("bert")
    with pytest.raises(PEFTError, match="has no adapters"):
        combine(model, ["a"], [1.0], "new")
    inject(model, [LoRA(r=2), BitFit()], name="a")
    with pytest.raises(PEFTError, match="'a' is a BitFit"):
        combine(model, ["a"], [1.0], "new")
    model, _ = adapted("llama")
    with disable(model), pytest.raises(PEFTError, match="Cannot inject inside of"):
        combine(model, ["a"], [1.0], "new")
