"""What a training step keeps, launches, sends and needs: counted, not timed. `make bench` times."""

import itertools
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks import (
    bounds,
    checkpoints,
    graphs,
    host_time,
    kept_bytes,
    launches,
    lifecycle,
    measure,
    peak_memory,
    subjects,
    traffic,
    variants,
    ways,
)
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft import LoRA, inject
from lightning_peft.adapters.low_rank import products

CASES = launches.cases()
OURS, PEFT, BOUND, FULL = (
    next(v for v in variants.VARIANTS if v.name == name)
    for name in (variants.OURS, variants.PEFT, variants.BOUND, variants.FULL)
)
# Beyond the layer's own, forward and backward; the floor of a layer alone is x·Aᵀ, + h·Bᵀ; dY·B, dA, dB, + dH·A.
MOST = {
    "a layer with its own input": 6,
    "with dropout 0.05": 9,
    "float32 adapters, bfloat16 base": 9,
    "average in a Llama block": 5.9,
    "the same with dropout 0.05": 8.9,
}
SHAPES = {
    "llama": subjects.Shape(LlamaConfig(**launches.SMALL), 2, 512),
    "encoder": subjects.Shape(subjects.BertConfig(**launches.SMALL, **subjects.NO_DROPOUT), 2, 512),
}


def together(name: str, variant: str) -> float:
    subject, hidden, count, dropout = CASES[name]
    return sum(launches.per_layer(variant, subject, hidden, count, dropout))


@pytest.mark.parametrize("name", CASES)
def test_operators_launched(name: str) -> None:
    assert MOST.keys() == CASES.keys()
    assert 0 < together(name, variants.OURS) <= MOST[name]
    assert together(name, variants.OURS) <= 0.65 * together(name, variants.PEFT)


def test_the_arithmetic_bound_is_that_of_the_formula() -> None:
    """LoRA adds 3 r (in + out) multiplications a token to the 2 in · out of a frozen layer and its dX."""
    subject, hidden, _, _ = CASES["a layer with its own input"]
    counted = [
        bounds.flops(lambda model=model: measure.backward(model(hidden)))  # type: ignore[misc]
        for model in (OURS.build(subject), BOUND.build(subject))
    ]
    assert counted[0] / counted[1] == 1 + 3 * 8 * (64 + 64) / (2 * 64 * 64)


def test_the_elements_that_adapters_move() -> None:
    """In a block of Llama: q, k and v share an input, and so do gate and up."""
    shape = subjects.Shape(LlamaConfig(**{**launches.SMALL, "num_hidden_layers": 1}), 1, 4)
    bound, hidden = BOUND.build(shape.build("meta")), shape.inputs("meta")
    inputs, outputs = 64 + 64 + 64 + 96, 64 + 32 + 32 + 64 + 96 + 96 + 64
    assert bounds.elements(bound, hidden, fused=False) == 4 * inputs + 4 * outputs
    assert bounds.elements(bound, hidden, fused=True) == 2 * inputs + outputs


def test_the_largest_line_decides() -> None:
    shape = subjects.Shape(LlamaConfig(**launches.SMALL), 1, 4)
    assert bounds.at_least(shape, "a server CPU")[1] == "arithmetic"
    assert bounds.at_least(shape, "NVIDIA H200, torch 3")[1] == "launches"
    assert bounds.beside((1.2, "launches"), measure.Spread.of([1.25])) == "1.200 (launches): met"
    assert bounds.beside((1.2, "launches"), measure.Spread.of([1.8])) == "1.200 (launches): 1.50 times it"


def test_a_cpu_copies_one_matrix_more() -> None:
    subject, hidden, count, dropout = CASES["a layer with its own input"]
    assert sum(launches.per_layer(variants.OURS, subject, hidden, count, dropout, device="cpu")) == 7
    names = measure.operators(OURS.build(subject), hidden)[1]
    assert names.count("copy_") == count


def test_the_count_sees_what_is_known() -> None:
    """HF peft's layer is dropout, two products, a multiplication, an addition; backward six more."""
    names = measure.operators(PEFT.build(CASES["a layer with its own input"][0]), CASES["with dropout 0.05"][1])
    plain = measure.operators(BOUND.build(CASES["a layer with its own input"][0]), CASES["with dropout 0.05"][1])
    assert [len(names[0]) - len(plain[0]), len(names[1]) - len(plain[1])] == [4 * 4, 4 * 6]
    assert sorted(plain[0]) == ["gelu"] * 4 + ["mm"] * 4


def test_calls_of_python_beside_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a narrow model waits for: two hooks, the adapter, and of torch no function that would do nothing."""
    monkeypatch.setattr(products, "_MANY_ON_CPU", 2**16)  # as it is, but in other tests
    shape = subjects.Shape(LlamaConfig(**host_time.NARROW), 1, 8)
    subject, hidden = shape.build(), shape.inputs()
    ours, theirs = (host_time.calls_per_layer(name, subject, hidden) for name in (variants.OURS, variants.PEFT))
    assert ours <= 22
    assert ours < theirs


def test_the_count_of_calls_sees_what_is_known() -> None:
    def twice() -> None:
        for _ in range(2):
            int("1")  # written in C
            (lambda: None)()

    assert host_time.python_calls(twice) == 3


@pytest.mark.parametrize("family", SHAPES)
def test_bytes_kept(family: str) -> None:
    """Those of the frozen model and one copy of each distinct input, and x·Aᵀ; with dropout a byte per element more."""
    subject, hidden = SHAPES[family].build(), SHAPES[family].inputs()
    bound = BOUND.build(subject)
    targets = kept_bytes.targets_of(bound)
    floor = kept_bytes.floor(bound, hidden, targets)
    reduced = kept_bytes.reduced_bytes(hidden, len(targets))
    assert kept_bytes.kept(bound, hidden) < floor
    assert kept_bytes.kept(OURS.build(subject), hidden) == floor + reduced
    inputs, _ = measure.input_storages(lambda: bound(hidden), targets)
    masks = sum(inputs.values()) // hidden.element_size()
    dropped = kept_bytes.kept(OURS.build(subject, 0.05), hidden)
    assert dropped == floor + reduced + masks
    assert kept_bytes.kept(PEFT.build(subject, 0.05), hidden) > floor + reduced + 4 * masks


def test_nothing_evades_the_count_of_kept_bytes() -> None:
    """What is allocated and alive after a forward pass is what was counted, and the output."""
    subject, hidden = SHAPES["llama"].build(), SHAPES["llama"].inputs()
    model = OURS.build(subject)
    alive: list[Any] = []
    stays = measure.left_bytes(lambda: alive.append(model(hidden)))
    counted = kept_bytes.kept(model, hidden)
    # hidden itself was there before; tables of the positions are no one's.
    assert counted - hidden.nbytes <= stays <= counted + alive[0].nbytes + 0.05 * counted


def test_peak_memory_of_a_step() -> None:
    shape = subjects.Shape(LlamaConfig(**{**launches.SMALL, "hidden_size": 256, "intermediate_size": 512}), 1, 4)
    subject, hidden = shape.build(), shape.inputs()
    lora, full = (peak_memory.step_memory(variant.build(subject), hidden) for variant in (OURS, FULL))
    model = OURS.build(subject)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    ratio = sum(lora.values()) / sum(full.values())
    assert ratio <= 1 / 3
    assert ratio == pytest.approx(peak_memory.without_activations(lora["weights"], trained), abs=0.03)
    weights = full["weights"]
    # Gradients of all, and activations besides.
    assert full["state"] == pytest.approx(2 * weights, rel=0.01)
    assert full["added"] > 0.9 * weights


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1), (torch.bfloat16, 0.75)])
def test_memory_of_a_merge_for_good(dtype: torch.dtype, most: float) -> None:
    """A delta of one layer, whatever their number; of bfloat16 weights the new one, and some rows in float32."""
    for layers in (2, 6):
        ours, theirs = lifecycle.merge_memory(2048, layers, dtype, keep=False)
        assert ours <= most + 0.1
        assert ours < theirs


def test_saving_needs_no_more_memory_beside_a_larger_base(tmp_path: Any) -> None:
    sizes = [checkpoints.saving_memory(checkpoints.beside_frozen(layers), tmp_path / "a") for layers in (3, 39)]
    # What another test has left behind may be collected on the way.
    assert max(sizes) - min(sizes) < 2**10
    assert max(sizes) < 2**20


def test_the_papers_count() -> None:
    """arXiv:2106.09685, section 4.2: 350 GB to 35 MB, about 10,000 times."""
    rows = {(model, adapter): rest for model, adapter, *rest in checkpoints.analytic()}
    count, size, times = rows["GPT-3 175B", "r = 4 on q, v"]
    assert (count, size) == (18_874_368, 36.0)
    assert int(times) == 9271
    assert rows["Llama-7B", "r = 8 on q, v"][0] == 4_194_304


@pytest.mark.parametrize("size", ["7B", "70B"])
def test_the_formulas_are_those_of_the_models(size: str) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(subjects.llama_config(size))
    assert checkpoints.llama_parameters(size) == sum(p.numel() for p in model.parameters())
    inject(model, LoRA(r=8))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rows = {(name, adapter): count for name, adapter, count, *_ in checkpoints.analytic()}
    assert rows[f"Llama-{size}", "r = 8 on all linear layers"] == trained


def test_ddp_sends_what_is_trained() -> None:
    counted = traffic.count(1, peft=True)
    # All linear layers of SmolLM2's 30, with r = 8, have 2,442,240 parameters: Σ r (in + out).
    assert counted["sent"] == counted["trained"] == 4 * 2_442_240 / 30
    assert counted["searches"] is False


def test_layers_of_the_peers_compute_the_same() -> None:
    """Or they would be compared with something else: equal outputs from equal adapters."""
    subject, hidden = SHAPES["llama"].build(), SHAPES["llama"].inputs()
    outputs = []
    for variant in variants.present():
        if variant.name in (variants.BOUND, variants.FULL):
            continue
        model = variant.build(subject)
        numbers = itertools.count()
        for name, parameter in sorted(model.named_parameters(), key=lambda pair: _plain(pair[0])):
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(next(numbers)))
        outputs.append(model(hidden))
    assert len(outputs) > 1
    assert all((output - outputs[0]).abs().max() < 1e-4 for output in outputs[1:])
    assert (outputs[0] - subject(hidden)).abs().max() > 1e-2


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    def product_and(x: Tensor, y: Tensor, h: Tensor, z: Tensor, scale: float) -> Tensor:
        return x @ y + scale * h @ z

    monkeypatch.setitem(sys.modules, "benchmarks.epilogue", SimpleNamespace(product_and=product_and))


@pytest.mark.usefixtures("without_triton")
@pytest.mark.parametrize("way", [ways.plain, ways.one_matrix, ways.Fused.apply])
def test_other_ways_compute_the_same_layer(way: Any) -> None:
    """Outputs by the formula, gradients by differences."""
    generator = torch.Generator().manual_seed(0)
    x, weight, a, b = (
        torch.randn(size, generator=generator, dtype=torch.float64) for size in ((5, 4), (3, 4), (2, 4), (3, 2))
    )
    expected = torch.einsum("ni,oi->no", x, weight + 1.5 * torch.einsum("or,ri->oi", b, a))
    torch.testing.assert_close(way(x, weight, a, b, 1.5), expected)
    trained = [tensor.requires_grad_() for tensor in (x, a, b)]
    assert torch.autograd.gradcheck(lambda x, a, b: way(x, weight, a, b, 1.5), trained)


def test_a_replay_that_trains_something_else_is_seen() -> None:
    step = graphs.Step(OURS.build(SHAPES["llama"].build()), SHAPES["llama"].inputs())
    start = [parameter.detach().clone() for parameter in step.trained]

    def half() -> None:
        for group in step.optimizer.param_groups if step.optimizer else ():
            group["lr"] /= 2
        step()

    assert graphs.apart(step, step, start) < 1e-5
    assert graphs.apart(step, half, start) > 0.1


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in ("peft", "default", "weight", "base_layer"))
