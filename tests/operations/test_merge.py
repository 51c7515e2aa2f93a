"""Merging changes outputs by rounding only, and can be undone bit for bit."""

from pathlib import Path

import pytest
import torch
from families import FAMILIES, build, outputs, randomise
from torch import nn
from transformers import AutoModelForCausalLM
from unchanged import assert_unchanged, snapshot

from lightning_peft import (
    IA3,
    OFT,
    BitFit,
    DoRA,
    LoHa,
    LoKr,
    LoRA,
    MiSS,
    PEFTError,
    PEFTMethod,
    VeRA,
    inject,
    merge,
    unmerge,
)
from lightning_peft.adapters.low_rank.linear import LoRAAdapter
from lightning_peft.core.view import ModelView
from lightning_peft.errors import NotFiniteError
from lightning_peft.operations import fold
from lightning_peft.operations.merge import MergeReport, is_merged


@pytest.mark.parametrize("family", FAMILIES)
def test_merge_and_unmerge(family: str) -> None:
    model, inputs = build(family)
    inject(model, LoRA(r=2))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    randomise(model)
    expected = outputs(model, inputs)
    report = merge(model)
    merged = outputs(model, inputs)
    assert report.merged > 0
    assert report.largest_loss < 1e-5
    assert (merged - expected).abs().max() <= 1e-5
    assert any(not torch.equal(p, weights[n]) for n, p in model.named_parameters() if "lora" not in n)
    merge(model)
    assert torch.equal(outputs(model, inputs), merged)
    unmerge(model)
    assert torch.equal(outputs(model, inputs), expected)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if "lora" not in n)


def test_unloading_leaves_a_plain_model() -> None:
    model, inputs = build("llama")
    keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    inject(model, LoRA(r=2))
    randomise(model)
    expected = outputs(model, inputs)
    merge(model)
    merge(model, unload=True)
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == classes
    assert all(p.requires_grad for p in model.parameters())
    assert (outputs(model, inputs) - expected).abs().max() <= 1e-5


def test_a_tied_weight_is_untied(tmp_path: Path) -> None:
    model, inputs = build("gemma3")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    inject(model, LoRA(r=2, target_modules=["embed_tokens", "q_proj"]))
    randomise(model)
    head, expected = model.lm_head.weight.detach().clone(), outputs(model, inputs)
    merge(model)
    assert torch.equal(model.lm_head.weight, head)
    assert (outputs(model, inputs) - expected).abs().max() <= 1e-5
    unmerge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True
    assert torch.equal(outputs(model, inputs), expected)
    merge(model, unload=True)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert (outputs(loaded, inputs) - expected).abs().max() <= 1e-5


class Views(nn.Module):
    """Layers whose weights are parameters of their own, and one piece of memory."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder, self.other = nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 8)
        self.decoder.weight = nn.Parameter(self.encoder.weight.t())
        self.register_buffer("rows", self.other.weight.detach()[2:4])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.decoder(torch.relu(self.encoder(x)))) @ self.rows.T


@pytest.mark.parametrize("targets", [["encoder"], ["encoder", "decoder", "other"]])
@pytest.mark.parametrize("unload", [False, True])
def test_weights_of_one_memory_are_untied(targets: list[str], unload: bool) -> None:
    model, x = Views(), torch.randn(3, 8)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inject(model, LoRA(r=2, target_modules=targets))
    randomise(model)
    expected = model(x)
    merge(model, unload=unload)
    assert torch.allclose(model(x), expected, atol=1e-5)
    others = [name for name in base if name.partition(".")[0] not in targets]
    assert all(torch.equal(model.state_dict()[name], base[name]) for name in others)
    if not unload:
        unmerge(model)
        assert torch.equal(model(x), expected)
        assert model.decoder.weight.data_ptr() == model.encoder.weight.data_ptr()
        assert all(torch.equal(model.state_dict()[name], value) for name, value in base.items())


@pytest.mark.parametrize("unload", [False, True])
def test_a_shared_bias_is_untied(unload: bool) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(3, 4)
    model[1].bias = model[2].bias = shared = model[0].bias
    values = shared.detach().clone()
    inject(model, IA3(target_modules=["0", "1"]))
    randomise(model)
    expected = model(x)
    merge(model, unload=unload)
    assert torch.allclose(model(x), expected, atol=1e-5)
    assert model[2].bias is shared
    assert torch.equal(shared, values)
    if not unload:
        unmerge(model)
        assert torch.equal(model(x), expected)
        assert all(layer.bias is shared for layer in model)


def test_neighbours_in_one_memory_are_written_in_place() -> None:
    """As a mapped file or the flat buffer of an optimizer has them."""
    model, flat = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)), torch.randn(32)
    for layer, values in zip(model, flat.chunk(2), strict=True):
        layer.weight = nn.Parameter(values.view(4, 4))
    inject(model, LoRA(r=2))
    randomise(model)
    weights = list(model.parameters())
    merge(model)
    assert all(p is weight for p, weight in zip(model.parameters(), weights, strict=True))


def test_what_rounding_takes_is_reported() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256)).to(torch.bfloat16)
    inject(model, LoRA(r=4))
    a, b = (p for n, p in model.named_parameters() if "lora" in n)
    nn.init.normal_(b, std=0.002)
    change = (4 * b @ a).detach()
    ideal = model[0].weight.detach().float() + change
    report = merge(model)
    lost = (model[0].weight.float() - ideal).norm() / change.norm()
    assert report.largest_loss == pytest.approx(lost.item(), rel=1e-4)
    assert report.largest_loss > 0.05
    assert report.worst == "0"


def test_everything_is_checked_before_the_first_write() -> None:
    model, _ = build("llama")
    inject(model, LoRA(r=2))
    randomise(model)
    last = [p for n, p in model.named_parameters() if "lora_B" in n][-1]
    with torch.no_grad():
        last[0, 0] = float("nan")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PEFTError, match="NaN or infinity"):
        merge(model)
    assert all(torch.equal(value, before[n]) or n.endswith("lora_B") for n, value in model.state_dict().items())


def layers(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.MultiheadAttention(8, 2), nn.Linear(8, 8)).to(dtype)


@pytest.mark.parametrize("unload", [False, True])
@pytest.mark.parametrize("name", ["3", "2"])
@pytest.mark.parametrize(
    ("dtype", "value", "message"),
    [
        (torch.float16, 3e3, r"values up to 1\.\de\+05; torch\.float16 holds no more than 6\.55e\+04"),
        (torch.bfloat16, 1e30, r"values up to inf; torch\.bfloat16"),
        (torch.float32, 1e30, r"values up to inf; torch\.float32"),
    ],
)
def test_weights_that_would_overflow_are_refused(
    name: str, dtype: torch.dtype, value: float, message: str, unload: bool
) -> None:
    model = layers(dtype)
    inject(model, LoRA(r=2, alpha=2, target_modules=["0", "2", "3"]))
    randomise(model)
    for key, parameter in model.named_parameters():
        if key.startswith(f"{name}.peft"):
            nn.init.constant_(parameter, value if key.endswith("B") else 1e10 if value > 1e4 else 20)
    before = snapshot(model)
    with pytest.raises(NotFiniteError, match=rf"weight of '{name}.* would hold {message}"):
        merge(model, unload=unload)
    assert_unchanged(model, before)


@pytest.mark.parametrize("unload", [False, True])
def test_a_bias_that_would_overflow_is_refused(unload: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False)).half()
    inject(model, BitFit(create_missing=True))
    (bias,) = (parameter for name, parameter in model.named_parameters() if ".peft." in name)
    nn.init.constant_(bias, 1e5)
    before = snapshot(model)
    with pytest.raises(NotFiniteError, match=r"weight of '0\.bias' would hold values up to 1e\+05"):
        merge(model, unload=unload)
    assert_unchanged(model, before)


def test_an_adapter_that_would_overflow_is_loaded_beside_the_merged_weight() -> None:
    model = layers(torch.float16)
    inject(model, LoRA(r=2, target_modules=["0"]))
    state = {n: torch.full_like(t, 1e4) if ".peft." in n else t.clone() for n, t in model.state_dict().items()}
    weight = model[0].weight.clone()
    merge(model)
    with pytest.raises(NotFiniteError, match="weight of '0'"):
        model.load_state_dict(state)
    assert not is_merged(model)
    assert torch.equal(model[0].weight, weight)


def test_an_interrupted_merge_for_good_cannot_be_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = build("llama")
    inject(model, LoRA(r=2))
    randomise(model)
    fold, calls = LoRAAdapter.fold, []

    def interrupted(self: LoRAAdapter, *args: torch.Tensor) -> object:
        calls.append(self)
        if len(calls) > len(set(calls)) + 3:  # everything is worked out before anything is written
            raise KeyboardInterrupt
        return fold(self, *args)

    monkeypatch.setattr(LoRAAdapter, "fold", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(model, unload=True)
    with pytest.raises(PEFTError, match="was interrupted"):
        unmerge(model)


def test_a_model_without_adapters_is_an_error() -> None:
    with pytest.raises(PEFTError, match="has no adapters"):
        merge(nn.Linear(2, 2))


def test_what_a_report_says() -> None:
    report = MergeReport.of(2, {"a": 0.25, "b": 0.75}, kept=("c",))
    assert (report.mean_loss, report.largest_loss, report.worst) == (0.5, 0.75, "b")
    assert str(report) == (
        "Merged 2 adapters into the weights; rounding took 50.00% of their effect on average, 75.00% at most (b). "
        "1 adapters cannot be merged and stay attached."
    )
    nothing = MergeReport.of(0, {})
    assert (nothing.mean_loss, nothing.largest_loss, nothing.worst) == (0.0, 0.0, "")
    assert str(nothing) == "Nothing to merge: what was trained is in the weights."


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "method",
    [
        LoRA(r=2),
        DoRA(r=2),
        LoHa(r=2),
        LoKr(r=1),
        LoKr(r=1, decompose_both=True, decompose_factor=3),
        VeRA(r=5, d_initial=1.0),
        OFT(block_size=4),
        MiSS(r=3),
        MiSS(r=3, mini_r=4),
        IA3(target_modules=["0", "2"], feedforward_modules=["2"]),
    ],
    ids=repr,
)
def test_some_rows_after_others(method: PEFTMethod, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is merged so is what is merged at once."""
    monkeypatch.setattr(fold, "_ELEMENTS", 60)  # five rows, and four
    model = nn.Sequential(nn.Linear(12, 24, bias=bias), nn.ReLU(), nn.Linear(24, 12, bias=bias)).double()
    inject(model, method, seed=0)
    x = torch.randn(3, 12, dtype=torch.float64)
    with torch.no_grad():
        for parameter in ModelView(model).adapter_parameters.values():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    expected, by_rows = model(x), 0
    for name, host, slot in ModelView(model).slots:
        adapter = slot.active_adapter
        if not fold.can_fold_rows(host, adapter):
            # IA3 rescales the bias of an output as well.
            assert (type(method), bias, name) == (IA3, True, "0")
            continue
        by_rows += 1
        whole, _ = fold.merged_values(host, adapter, {n: p.detach() for n, p in host.named_parameters(recurse=False)})
        weight = host.weight.detach().clone()
        fold.fold_rows(host, adapter, weight)
        assert (weight - whole["weight"]).abs().max() <= 1e-14
        assert (weight - host.weight).abs().max() > 1e-3
    assert by_rows
    merge(model)
    assert (model(x) - expected).abs().max() <= 1e-12
