"""Sizes, spectra and subspaces of changes; the judges are NumPy's dense decompositions and closed formulas."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from families import build
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_peft import (
    IA3,
    AdaLoRA,
    BitFit,
    DoRA,
    LoHa,
    LoKr,
    LoRA,
    PEFTError,
    PrefixTuning,
    SeriesAdapter,
    inject,
    merge,
    save_adapter,
)
from lightning_peft.analysis import (
    WeightChange,
    amplification,
    changes,
    directions,
    random_similarity,
    read_changes,
    share_initial_a,
    similarity,
    subspace_similarity,
)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def low_rank(seed: int, out: int = 24, r: int = 4, into: int = 40, **options: Any) -> WeightChange:
    b, a = drawn(seed, out, r), drawn(seed + 100, r, into)
    return WeightChange(b, a, a, b, **options)


def adapted(method: Any, seed: int = 0, far: float = 0.1) -> nn.Module:
    model = build("llama")[0]
    inject(model, method)
    with torch.no_grad():
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter += far * drawn(seed + number, *parameter.shape).to(parameter)
    return model


@pytest.mark.parametrize(
    "method",
    [
        LoRA(r=3, alpha=7, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2}),
        LoRA(r=3, use_rslora=True, target_modules=["embed_tokens"]),
        DoRA(r=3, target_modules=["q_proj"]),
        LoHa(r=2, target_modules=["q_proj"]),
        IA3(target_modules=["k_proj"]),
    ],
    ids=lambda method: type(method).__name__,
)
def test_a_change_is_what_merging_does_to_the_weight(method: Any) -> None:
    model = adapted(method).double()
    found = dict(changes(model))
    before = {name: model.get_submodule(name).weight.detach().clone() for name in found}
    assert found
    for name, change in found.items():
        assert change.weight is not None
        weight = before[name].T if "embed" in name else before[name]
        assert torch.equal(change.weight, weight)
    merge(model)
    for name, change in found.items():
        moved = model.get_submodule(name).weight.detach() - before[name]
        dense = (moved.T if "embed" in name else moved).numpy()
        assert np.abs((change.left @ change.right).numpy() - dense).max() <= 1e-12
        values = np.linalg.svd(dense, compute_uv=False)
        k = len(change.spectrum)
        assert np.abs(change.spectrum.numpy() - values[:k]).max() <= 1e-12
        assert values[k:].max(initial=0) <= 1e-12
        assert change.norm == pytest.approx(np.linalg.norm(dense))
        assert change.relative_norm == pytest.approx(np.linalg.norm(dense) / np.linalg.norm(before[name].numpy()))
        assert change.stable_rank == pytest.approx(np.linalg.norm(dense) ** 2 / np.linalg.norm(dense, 2) ** 2)
        shares = values[:k] / values[:k].sum()
        assert change.effective_rank == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares if p > 0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("method", "rank"), [(LoHa(r=2), 4), (LoKr(r=2), 16), (AdaLoRA(init_r=3, target_r=2), 3)])
def test_the_rank_of_a_change_is_the_methods_in_every_dtype(method: Any, rank: int, dtype: torch.dtype) -> None:
    """A product of two of rank r has r² at most; a Kronecker product the product of its factors' ranks: 8 · 2."""
    model = nn.Sequential(nn.Linear(96, 64, bias=False)).to(dtype)
    inject(model, replace(method, target_modules=["0"]))
    for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        parameter.data = drawn(number, *parameter.shape).to(parameter.dtype)
    before = [p.detach().clone() for p in model.parameters()]
    (change,) = dict(changes(model)).values()
    assert change.rank == rank
    assert directions(change).shape == (96, rank)
    assert amplification(change).rank == rank
    assert all(torch.equal(p, q) and p.dtype == q.dtype for p, q in zip(model.parameters(), before, strict=True))


def test_ranks_of_plain_changes() -> None:
    equal = WeightChange(torch.eye(9, 5, dtype=torch.float64), torch.eye(5, 7, dtype=torch.float64))
    assert (equal.stable_rank, equal.effective_rank) == (pytest.approx(5), pytest.approx(5))
    none = WeightChange(torch.zeros(9, 5, dtype=torch.float64), torch.eye(5, 7, dtype=torch.float64))
    assert (none.norm, none.stable_rank, none.effective_rank) == (0, 0, 0)
    assert equal.relative_norm is None
    assert directions(none).shape == (7, 0)


@pytest.mark.parametrize(
    "options", [{"use_rslora": True}, {"alpha_pattern": {"v_proj": 3}, "rank_pattern": {"q_proj": 5}}]
)
def test_a_directory_of_hf_peft_tells_the_same_without_its_base(options: dict[str, Any], tmp_path: Path) -> None:
    model = build("llama")[0]
    judge: Any = peft.get_peft_model(
        model, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"], **options)
    )
    for number, (name, parameter) in enumerate(judge.named_parameters()):
        if "lora_" in name:
            parameter.data = drawn(number, *parameter.shape).float()
    judge.save_pretrained(tmp_path)
    found = read_changes(tmp_path)
    layers = {
        name: layer for name, layer in judge.base_model.model.named_modules() if hasattr(layer, "get_delta_weight")
    }
    assert found.keys() == layers.keys()
    for name, layer in layers.items():
        expected = layer.get_delta_weight("default")
        assert (found[name].left @ found[name].right - expected).abs().max() <= 1e-5


def test_similarity_is_the_papers_formula() -> None:
    """Word for word: ‖U_Aᵢᵀ U_Bⱼ‖²_F / min(i, j), with right-singular vectors by NumPy."""
    first, second = low_rank(1, r=3), low_rank(2, r=5)
    for basis, of in (
        ("A", lambda c: np.linalg.svd(c.lora_A.numpy())[2].T),
        ("right", lambda c: np.linalg.svd((c.left @ c.right).numpy())[2].T),
        ("left", lambda c: np.linalg.svd((c.left @ c.right).numpy())[0]),
    ):
        grid = similarity(first, second, basis)  # type: ignore[arg-type]
        assert grid.shape == (3, 5)
        for i in range(1, 4):
            for j in range(1, 6):
                product = of(first)[:, :i].T @ of(second)[:, :j]
                assert float(grid[i - 1, j - 1]) == pytest.approx(np.linalg.norm(product) ** 2 / min(i, j))


def test_similarity_of_known_spaces() -> None:
    basis = torch.linalg.qr(drawn(3, 20, 6))[0]
    grid = subspace_similarity(basis[:, :4], basis)
    assert torch.allclose(grid.diagonal(), torch.ones(4, dtype=torch.float64))
    assert subspace_similarity(basis[:, :2], basis[:, 4:]).abs().max() <= 1e-15
    # Of as many directions as A has, turning them among themselves changes nothing.
    change = low_rank(4, r=4)
    turned = WeightChange(change.left, change.right, drawn(5, 4, 4) @ change.right)
    assert float(similarity(change, turned, "A")[3, 3]) == pytest.approx(1)
    whole = torch.eye(20, dtype=torch.float64)
    assert torch.allclose(subspace_similarity(basis[:, :3], whole)[:, -1], torch.ones(3, dtype=torch.float64))


def test_the_average_of_random_spaces() -> None:
    grids = [similarity(low_rank(2 * n, r=3), low_rank(2 * n + 1001, r=6), "A") for n in range(200)]
    mean = torch.stack(grids).mean(0)
    for i in range(1, 4):
        for j in range(1, 7):
            assert float(mean[i - 1, j - 1]) == pytest.approx(random_similarity(i, j, 40), rel=0.12)
    assert random_similarity(8, 64, 576) == pytest.approx(64 / 576)


def test_the_same_start_is_noticed() -> None:
    first, second = (adapted(LoRA(r=r, target_modules=["q_proj"]), seed, 0.01) for r, seed in ((4, 1), (8, 50)))
    for (_, one), (_, other) in zip(changes(first), changes(second), strict=True):
        assert not share_initial_a(one, low_rank(7, 32, 4, 32))
        assert share_initial_a(one, other)  # drawn with one seed, and hardly moved


def test_amplification_is_table_seven() -> None:
    weight = drawn(6, 24, 40)
    change = low_rank(8, weight=weight)
    u, values, vh = np.linalg.svd((change.left @ change.right).numpy(), full_matrices=False)
    _, own, own_vh = np.linalg.svd(weight.numpy())
    for r in (1, 3, 4):
        row = amplification(change, r)
        projected = u[:, :r].T @ weight.numpy() @ vh[:r].T
        assert row.in_change == pytest.approx(np.linalg.norm(projected))
        assert row.factor == pytest.approx(np.linalg.norm(values) / np.linalg.norm(projected))
        assert row.in_weight == pytest.approx(math.sqrt((own[:r] ** 2).sum()))
        assert row.in_random == pytest.approx(np.linalg.norm(weight.numpy()) * r / math.sqrt(24 * 40))
        overlap = np.linalg.norm(own_vh[:r] @ vh[:r].T) ** 2 / r
        assert float(row.overlap[r - 1, r - 1]) == pytest.approx(overlap)
        # Appendix H.3: the first tenth of the directions of W, which has 24.
        top = np.linalg.norm(own_vh[:2] @ vh[:r].T) ** 2 / min(2, r)
        assert row.overlap.shape == (24, r)
        assert row.in_top == pytest.approx(top)
    assert amplification(change).rank == 4
    # The paper's figures for random directions of GPT-3's query weight, r = 4 and 64.
    assert pytest.approx(0.02, abs=5e-4) == 61.95 * 4 / 12288
    at_random = []
    for seed in range(60):
        sides = (torch.linalg.qr(drawn(seed + 9 * d, d, 4))[0] for d in (24, 40))
        left, right = sides
        at_random.append(float((left.T @ weight @ right).square().sum()))
    assert math.sqrt(sum(at_random) / len(at_random)) == pytest.approx(amplification(change).in_random, rel=0.1)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(PEFTError, match="no change of the weight"):
        list(changes(adapted(SeriesAdapter(bottleneck=2))))
    with pytest.raises(PEFTError):
        list(changes(adapted(PrefixTuning(num_virtual_tokens=2))))
    model = adapted(LoRA(r=2))
    with pytest.raises(PEFTError, match="no adapter 'other' here"):
        list(changes(model, "other"))
    merge(model)
    with pytest.raises(PEFTError, match="merged"):
        list(changes(model))
    save_adapter(adapted(IA3()), tmp_path)
    with pytest.raises(PEFTError, match="Name its base model"):
        read_changes(tmp_path)
    with pytest.raises(PEFTError, match="name the base model"):
        amplification(low_rank(1))
    with pytest.raises(PEFTError, match="rank=5 was given"):
        amplification(low_rank(1, weight=drawn(1, 24, 40)), 5)
    with pytest.raises(PEFTError, match="24 and among 40 features"):
        subspace_similarity(drawn(1, 24, 2), drawn(1, 40, 2))
    with pytest.raises(PEFTError, match="no LoRA's"):
        directions(WeightChange(drawn(1, 3, 3), drawn(2, 3, 3)), "A")
    with pytest.raises(PEFTError, match="basis='B' was given"):
        directions(low_rank(1), "B")  # type: ignore[arg-type]


def test_what_has_no_size_or_is_not_shown(tmp_path: Path) -> None:
    model = build("bert")[0]
    inject(model, LoRA(r=2, target_modules=["query"]), train_also=["classifier"])
    save_adapter(model, tmp_path / "sound")
    for look in (lambda: dict(changes(model)), lambda: read_changes(tmp_path / "sound")):
        with pytest.warns(UserWarning, match="Trained itself.*not looked at.*classifier.weight"):
            assert len(look()) == 2
    peft.PeftModel.from_pretrained(build("bert")[0], tmp_path / "sound").save_pretrained(tmp_path / "nan")
    content = load_file(tmp_path / "nan" / "adapter_model.safetensors")
    broken = next(name for name in content if "query.lora_B" in name)
    save_file({**content, broken: content[broken] * math.nan}, tmp_path / "nan" / "adapter_model.safetensors")
    with pytest.raises(PEFTError, match=r"NaN or infinity in .*query.lora_B.*has no size"):
        read_changes(tmp_path / "nan")
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if name.endswith("lora_A")).fill_(math.inf)
    with pytest.raises(PEFTError, match=r"query' holds NaN or infinity in lora_A"):
        dict(changes(model))
    biases = build("bert")[0]
    inject(biases, BitFit())
    with pytest.raises(PEFTError, match=r"Nothing stands beside a weight.*bias.*trained itself"):
        dict(changes(biases))
