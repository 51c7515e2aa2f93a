"""Mixtures of experts: what presets take of them, and that HF PEFT computes the same with it."""

from pathlib import Path

import peft
import pytest
import torch
from families import build, outputs, randomise
from torch import nn

from lightning_peft import DoRA, LoRA, PEFTMethod, inject, load_adapter, save_adapter
from lightning_peft.callbacks.summary import summary_table
from lightning_peft.core.view import ModelView
from lightning_peft.structure.experts import expert_weights, router_names


class Listed(nn.Module):
    """A module per expert, as in transformers 4, and a linear layer that chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)) for _ in range(4)])
        self.shared_expert = nn.ModuleDict({"gate_proj": nn.Linear(8, 4)})


class Packed(nn.Module):
    """Experts in 8 bits."""

    num_experts = 4

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.zeros(4, 8, 8, dtype=torch.uint8), requires_grad=False)


def adapted(model: nn.Module, method: PEFTMethod) -> set[str]:
    inject(model, method)
    return {name for name, _, _ in ModelView(model).slots}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize(
    ("preset", "others"), [("all-linear", ("q_proj", "k_proj", "v_proj", "o_proj")), ("mlp", ())], ids=["all", "mlp"]
)
def test_experts_belong_to_presets(family: str, preset: str, others: tuple[str, ...], tmp_path: Path) -> None:
    model, inputs = build(family)
    inject(model, LoRA(r=2, target_modules=preset))
    hosts = {name.removeprefix("model.layers.") for name, _, _ in ModelView(model).slots}
    attention = {f"{layer}.self_attn.{name}" for layer in (0, 1) for name in others}
    assert hosts == {"0.mlp.experts", "1.mlp.experts"} | attention
    trained = {name.rpartition(".factors.")[2] for name, _ in model.named_parameters() if ".factors." in name}
    assert trained == {f"{weight}.lora_{k}" for weight in ("gate_up_proj", "down_proj") for k in "AB"}
    randomise(model)
    save_adapter(model, tmp_path / "a")
    judge = peft.PeftModel.from_pretrained(build(family)[0], tmp_path / "a").eval()
    effect = outputs(model, inputs) - outputs(build(family)[0], inputs)
    assert (outputs(judge, inputs) - outputs(model, inputs)).abs().max() <= 1e-5 < 1e-3 < effect.abs().max()
    loaded = build(family)[0]
    load_adapter(loaded, tmp_path / "a")
    assert torch.equal(outputs(loaded, inputs), outputs(model, inputs))


def test_what_chooses_is_adapted_by_name_alone() -> None:
    assert adapted(build("mixtral")[0], LoRA(r=2, target_modules="mlp.gate.weight")) == {
        f"model.layers.{layer}.mlp.gate" for layer in (0, 1)
    }
    listed = {f"experts.{expert}.{layer}" for expert in range(4) for layer in (0, 1)} | {"shared_expert.gate_proj"}
    model = nn.ModuleDict({"mlp": Listed()})
    assert adapted(model, LoRA(r=2)) == {f"mlp.{name}" for name in listed}
    assert router_names(ModelView(model)) == {"mlp.gate"}
    assert adapted(nn.ModuleDict({"mlp": Listed()}), LoRA(r=2, target_modules="gate")) == {"mlp.gate"}


def test_what_cannot_be_adapted_is_named() -> None:
    with pytest.warns(UserWarning, match=r"leaves out .*experts\.gate_up_proj.*the method adapts no MixtralExperts"):
        inject(build("mixtral")[0], DoRA(r=2))
    model = nn.ModuleDict({"linear": nn.Linear(8, 8), "experts": Packed()})
    with pytest.warns(UserWarning, match=r"leaves out 'experts\.up_proj': 'up_proj' of a Packed is .*torch\.uint8"):
        inject(model, LoRA(r=2))
    assert expert_weights(ModelView(model)).keys() == {"experts.up_proj"}


def test_the_summary_counts_experts() -> None:
    model, _ = build("mixtral")
    inject(model, LoRA(r=2, target_modules="mlp"))
    table = summary_table(model, [], "auto")  # type: ignore[arg-type]
    # Of each of two layers: gate and up [128, 32], down [32, 64], for four experts.
    count = 2 * 4 * 2 * (128 + 32 + 32 + 64)
    assert f"8 in 2 modules, with {count:,} parameters of adapters" in table


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_the_rank_can_be_divided_by_the_active_experts(family: str) -> None:
    """As `examples/docs/large_models.md` says: half the rank at the same scale, which is alpha over rank."""
    model, _ = build(family)
    inject(model, LoRA(r=4, alpha=8, rank_pattern={"experts.*": 2}, alpha_pattern={"experts.*": 4}))
    factors = model.get_submodule("model.layers.0.mlp.experts.peft.default.factors")
    assert {(part.r, part.scale, len(part.lora_A)) for part in factors.values()} == {(2, 2.0, 2 * 4)}
    beside = model.get_submodule("model.layers.0.self_attn.q_proj.peft.default")
    assert (len(beside.lora_A), beside.scale) == (4, 2.0)
