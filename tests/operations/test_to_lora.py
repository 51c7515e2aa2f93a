"""Changes of weights as LoRA: the judge is the best approximation of a rank, which its singular values tell."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import build, outputs, randomise, strongly
from torch import nn

from lightning_peft import (
    IA3,
    OFT,
    DoRA,
    LoHa,
    LoKr,
    LoRA,
    MiSS,
    ParallelAdapter,
    PEFTError,
    PEFTMethod,
    VeRA,
    difference_to_lora,
    inject,
    load_adapter,
    merge,
    save_adapter,
    to_lora,
)
from lightning_peft.cli import main
from lightning_peft.core.view import ModelView
from lightning_peft.operations.to_lora import nearest

TARGETS = ["q_proj", "down_proj"]
METHODS: dict[str, tuple[str, PEFTMethod]] = {
    "dora": ("llama", DoRA(r=2, target_modules=TARGETS)),
    "loha": ("llama", LoHa(r=2, target_modules=TARGETS)),
    "lokr": ("llama", LoKr(r=2, target_modules=TARGETS)),
    "miss": ("llama", MiSS(r=4, target_modules=TARGETS)),
    "oft": ("llama", OFT(block_size=4, target_modules=TARGETS)),
    "ia3": ("llama", IA3()),
    "vera": ("llama", VeRA(r=8, target_modules=["q_proj"])),
    "lora on Conv1D": ("gpt2", LoRA(r=2, target_modules=["c_attn", "c_fc"])),
    "dora on an embedding": ("llama", DoRA(r=2, target_modules=["embed_tokens", "q_proj"])),
}


def with_adapter(family: str, method: PEFTMethod) -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = build(family)
    inject(model, method)
    strongly(model)
    return model, inputs


@pytest.mark.parametrize("name", METHODS)
def test_the_change_becomes_a_lora_that_hf_peft_reads(name: str, tmp_path: Path) -> None:
    """With room for every rank nothing is lost."""
    family, method = METHODS[name]
    model, inputs = with_adapter(family, method)
    expected = outputs(model, inputs)
    scale = (expected - outputs(build(family)[0], inputs)).abs().max()
    report = to_lora(model, rank=64)
    assert max(report.losses.values()) < 1e-5
    assert (outputs(model, inputs) - expected).abs().max() <= 1e-4 * max(scale, 1)
    save_adapter(model, tmp_path / "a")
    judge = peft.PeftModel.from_pretrained(build(family)[0], tmp_path / "a").eval()
    assert (outputs(judge, inputs) - expected).abs().max() <= 1e-4 * max(scale, 1)


@pytest.mark.parametrize(("rank", "energy"), [(3, None), (None, 0.9)])
def test_a_rank_is_the_nearest_and_its_loss_is_told(rank: int | None, energy: float | None) -> None:
    """Eckart, Young: what is lost are the other singular values."""
    model, _ = with_adapter("llama", METHODS["dora"][1])
    plain = {name: module.weight for name, module in build("llama")[0].named_modules() if name.endswith(tuple(TARGETS))}
    report = to_lora(model, rank=rank, energy=energy)
    again, _ = with_adapter("llama", METHODS["dora"][1])
    merge(again, unload=True)
    assert report.ranks.keys() == plain.keys()
    for name, before in plain.items():
        squares = torch.linalg.svdvals((again.get_submodule(name).weight - before).double()).square()
        r = report.ranks[name]
        lost = (squares[r:].sum() / squares.sum()).sqrt().item()
        assert report.losses[name] == pytest.approx(lost, rel=1e-3, abs=1e-6)
        assert r == rank or (energy is not None and lost**2 <= 1 - energy < squares[r - 1 :].sum() / squares.sum())


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_factors_of_both_forms(shape: tuple[int, int]) -> None:
    change = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    a, b, lost = nearest(change, 2, None)
    assert a.shape == (2, shape[1])
    assert b.shape == (shape[0], 2)
    u, s, v = torch.linalg.svd(change)
    torch.testing.assert_close(b @ a, u[:, :2] * s[:2] @ v[:2], rtol=1e-4, atol=1e-5)
    assert lost == pytest.approx(float(s[2:].square().sum().sqrt() / s.square().sum().sqrt()), rel=1e-4)


def test_the_difference_of_two_models() -> None:
    tuned, inputs = build("llama")
    base, _ = build("llama")
    with torch.no_grad():
        for name, module in tuned.named_modules():
            if name.endswith(("v_proj", "model.norm")):
                module.weight.add_(torch.randn(module.weight.shape) * 0.3)
    report = difference_to_lora(base, tuned, rank=32)
    assert {name.rpartition(".")[2] for name in report.ranks} == {"v_proj"}
    assert set(report.left) == {"model.norm.weight"}
    assert "Left out, since a LoRA changes weights alone: model.norm.weight" in str(report)
    with torch.no_grad():
        base.model.norm.weight.copy_(tuned.model.norm.weight)
    assert (outputs(base, inputs) - outputs(tuned, inputs)).abs().max() <= 1e-4


def test_a_bias_that_changes_is_named() -> None:
    model, _ = with_adapter("qwen2", IA3(target_modules=["k_proj"], feedforward_modules=[]))
    assert "model.layers.0.self_attn.k_proj.bias" in to_lora(model, rank=4).left


REFUSED: dict[str, tuple[PEFTMethod, list[str], dict[str, Any], str]] = {
    "no change of weights": (ParallelAdapter(bottleneck=4), [], {"rank": 2}, "no LoRA comes near it"),
    "a head": (LoRA(r=2), ["lm_head"], {"rank": 2}, "'lm_head.weight' is trained whole"),
    "experts": (LoRA(r=2, target_modules="mlp"), [], {"rank": 2}, "lightning-peft export --experts mixtral"),
    "both": (LoRA(r=2), [], {"rank": 2, "energy": 0.5}, "either a rank"),
    "neither": (LoRA(r=2), [], {}, "either a rank"),
    "too much": (LoRA(r=2), [], {"energy": 1.5}, "between 0 and 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    method, whole, options, message = REFUSED[name]
    model, inputs = build("mixtral" if name == "experts" else "llama")
    inject(model, method, train_also=whole)
    randomise(model)
    expected = outputs(model, inputs)
    with pytest.raises(PEFTError, match=message):
        to_lora(model, **options)
    assert torch.equal(outputs(model, inputs), expected)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build("llama")[0].save_pretrained(tmp_path / "base")
    model, inputs = with_adapter("llama", METHODS["dora"][1])
    save_adapter(model, tmp_path / "dora")
    expected = outputs(model, inputs)
    merge(model, unload=True)
    model.save_pretrained(tmp_path / "tuned")
    for source in ("dora", "tuned"):
        out = tmp_path / f"{source}_lora"
        arguments = [f"--model={tmp_path / 'base'}", f"--out={out}", "--energy=0.999999"]
        with pytest.raises(SystemExit) as stop:
            main(["convert", str(tmp_path / source), *arguments])
        assert stop.value.code == 0
        assert "4 modules, of ranks" in capsys.readouterr().out
        loaded, _ = build("llama")
        load_adapter(loaded, out)
        assert {type(slot["default"]).__name__ for _, _, slot in ModelView(loaded).slots} == {"LoRAAdapter"}
        assert (outputs(loaded, inputs) - expected).abs().max() <= 2e-3
