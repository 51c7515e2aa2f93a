"""What presets take of a model, and what they say of the rest."""

import re
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from families import build, randomise
from odd_layers import Own
from torch import nn
from transformers import JambaConfig, JambaModel, MambaConfig, MambaModel, XLMConfig, XLMModel

from lightning_peft import (
    IA3,
    AdaLoRA,
    DoRA,
    LoHa,
    LoRA,
    PEFTError,
    PEFTMethod,
    SeriesAdapter,
    inject,
    load_adapter,
    merge,
    save_adapter,
)


class Siblings(nn.Module):
    """Attention and MLP in one module, whose names tell nothing about it."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({name: nn.Linear(8, 8) for name in names})])


class Diffusion(nn.Module):
    """Names of diffusers' transformer blocks."""

    def __init__(self) -> None:
        super().__init__()
        attention = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("to_q", "to_k", "to_v", "to_add_out")})
        attention["to_out"] = nn.ModuleList([nn.Linear(8, 8)])
        self.blocks = nn.ModuleList([nn.ModuleDict({"attn1": attention, "ff": nn.Sequential(nn.Linear(8, 8))})])


MODELS: dict[str, Callable[[], nn.Module]] = {
    "diffusion": Diffusion,
    "xlm": lambda: XLMModel(XLMConfig(vocab_size=32, emb_dim=16, n_layers=1, n_heads=2)),
    "mamba": lambda: MambaModel(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)),
    "jamba": lambda: JambaModel(
        JambaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, attn_layer_period=2,
            attn_layer_offset=1, num_attention_heads=2, num_key_value_heads=2, num_experts=1, mamba_d_state=4,
        )
    ),
    "plain": lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)),
    "siblings": lambda: Siblings("q", "k", "v", "o", "up", "down"),
    "unclear siblings": lambda: Siblings("q", "k", "v", "o", "first", "second"),
    "a gate beside": lambda: Siblings("to_q", "to_k", "to_v", "to_out", "to_gate"),
    "own attention": lambda: Siblings("q", "k", "v", "mix"),
}  # fmt: skip
FOUND = {
    ("diffusion", "attention"): {"to_q", "to_k", "to_v", "to_add_out", "to_out.0"},
    ("diffusion", "mlp"): {"ff.0"},
    ("xlm", "attention"): {"q_lin", "k_lin", "v_lin", "out_lin"},
    ("xlm", "mlp"): {"lin1", "lin2"},
    ("jamba", "attention"): {"q_proj", "k_proj", "v_proj", "o_proj"},
    ("jamba", "mlp"): {"gate_proj", "up_proj", "down_proj"},
    ("plain", "mlp"): {"0", "2"},
    ("own attention", "attention"): {"q", "k", "v", "mix"},
    ("siblings", "attention"): {"q", "k", "v", "o"},
    ("siblings", "mlp"): {"up", "down"},
}
REFUSED = {
    **{
        ("unclear siblings", p): r"told apart in 'blocks\.0': what 'blocks\.0\.first', 'blocks\.0\.second' belong"
        for p in ("attention", "mlp")
    },
    **{("a gate beside", preset): "cannot be told apart" for preset in ("attention", "mlp")},
    ("mamba", "attention"): "finds no attention block in this MambaModel",
    ("mamba", "mlp"): "finds no mlp block in this MambaModel",
    ("plain", "attention"): "finds no attention block",
    ("own attention", "mlp"): "finds no mlp block",
}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("preset", ["attention", "mlp"])
def test_attention_and_mlp(family: str, preset: str) -> None:
    model, method = MODELS[family](), LoRA(r=1, target_modules=preset)
    if message := REFUSED.get((family, preset)):
        with pytest.raises(PEFTError, match=message):
            inject(model, method)
        return
    names = inject(model, method)
    endings = FOUND[family, preset]
    assert all(name.endswith(tuple(endings)) for name in names)
    assert len(endings) <= len(names)


def test_no_bottleneck_stands_where_attention_and_mlp_cannot_be_told_apart() -> None:
    with pytest.raises(PEFTError, match="cannot be told apart in 'blocks"):
        inject(MODELS["unclear siblings"](), SeriesAdapter(bottleneck=2))
    names = inject(MODELS["siblings"](), SeriesAdapter(bottleneck=2, train_norms=False))
    assert names == ["blocks.0.o", "blocks.0.down"]
    names = inject(MODELS["siblings"](), IA3())
    assert names == ["blocks.0.k", "blocks.0.v", "blocks.0.down"]


class Grouped(nn.Module):
    """A layer of its own kind, whose matrices can be adapted where they are read."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 6, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("gi,goi->go", x, self.weight)


def convolutional() -> nn.Module:
    """Convolutions under many names: a narrow one, one whose groups cannot share the rank, and an embedding."""
    blocks = nn.ModuleList(nn.ModuleDict({"conv": nn.Conv1d(6, 6, 3, groups=groups)}) for groups in (1, 2, 3))
    head = nn.Sequential(nn.ReLU(), nn.Conv1d(4, 1, 1))
    return nn.ModuleDict({"0": nn.Embedding(9, 4), "1": nn.Conv1d(4, 4, 1), "blocks": blocks, "head": head})


@pytest.mark.parametrize(
    ("model", "kinds", "line", "hosts"),
    [
        (
            convolutional(),
            "1 Embedding, 5 Conv1d",
            "LoRA(r=2, target_modules=['1', 'conv', 'head.*'], exclude_modules=['blocks.2.conv'], "
            "rank_pattern={'head.1': 1})",
            ["1", "blocks.0.conv", "blocks.1.conv", "head.1"],
        ),
        (nn.Sequential(nn.Embedding(9, 4)), "1 Embedding", "LoRA(r=2, target_modules=['*'])", ["0"]),
        (nn.Sequential(Grouped()), "1 Grouped", "LoRA(r=2, target_modules=['weight'])", ["0"]),
    ],
    ids=["convolutions", "embedding", "a layer of its own kind"],
)
def test_what_to_write_without_linear_layers(model: nn.Module, kinds: str, line: str, hosts: list[str]) -> None:
    """What the error says to write works."""
    with pytest.raises(PEFTError, match=re.escape(f"It has {kinds}, which are adapted by name: {line}.")):
        inject(model, LoRA(r=2))
    assert inject(model, eval(line)) == hosts


def test_without_anything_to_adapt() -> None:
    with pytest.raises(PEFTError, match=r"finds no linear layer in this ModuleDict\.$"):
        inject(convolutional(), LoHa(r=2))


@pytest.mark.parametrize("method", [DoRA(r=2), LoRA(r=2, init="pissa"), AdaLoRA(init_r=2, target_r=1), LoHa(r=2)])
def test_attention_that_a_method_does_not_know(method: PEFTMethod) -> None:
    with pytest.warns(UserWarning, match=r"'all-linear' leaves out 'layers\.0\.self_attn', .* adapts no Multihead"):
        names = inject(build("torch_encoder")[0], method)
    assert [name.rpartition(".")[2] for name in names] == ["linear1", "linear2"] * 2


def test_attention_whose_weights_are_derived() -> None:
    model = build("torch_encoder")[0]
    nn.utils.parametrizations.weight_norm(model.layers[0].self_attn, "in_proj_weight")
    with pytest.raises(
        PEFTError, match=r"'layers.0.self_attn' cannot be adapted: its in_proj_weight is worked out from"
    ):
        inject(model, LoRA(r=2, target_modules="self_attn"))
    with pytest.warns(UserWarning, match="leaves out 'layers.0.self_attn': its in_proj_weight is worked out"):
        assert "layers.1.self_attn" in inject(model, LoRA(r=2))


def test_the_output_projection_of_attention_has_no_adapter_by_any_name() -> None:
    model = build("torch_encoder")[0]
    named = nn.ModuleDict({"projection": model.layers[0].self_attn.out_proj, "encoder": model})
    with pytest.raises(PEFTError, match=r"'projection' cannot be adapted: nn.MultiheadAttention reads its weight"):
        inject(named, LoRA(r=2, target_modules=["projection"]))
    assert "projection" not in inject(named, LoRA(r=2))


def test_linear_layers_of_others(tmp_path: Path) -> None:
    """LoRA changes their weight where it is read, as HF PEFT does with parameters that it is told."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(Own(), nn.Linear(6, 4), Own(bias=False))

    model, x = make(), torch.randn(3, 4)
    base = model(x)
    assert inject(model, LoRA(r=2)) == ["0", "1", "2"]
    assert torch.equal(model(x), base)
    randomise(model)
    trained = model(x)
    assert not torch.allclose(trained, base, atol=1e-3)
    save_adapter(model, tmp_path / "a")
    judge = peft.PeftModel.from_pretrained(make(), tmp_path / "a")
    assert torch.allclose(judge(x), trained, atol=1e-5)
    again = make()
    load_adapter(again, tmp_path / "a")
    assert torch.allclose(again(x), trained, atol=1e-6)
    assert merge(model, unload=True).merged == 3
    assert torch.allclose(model(x), trained, atol=1e-5)
    with pytest.warns(UserWarning, match="'all-linear' leaves out '0', '2': the method adapts no Own"):
        assert inject(make(), LoHa(r=2)) == ["1"]
    assert inject(make(), LoRA(r=2, exclude_modules="0")) == ["1", "2"]
