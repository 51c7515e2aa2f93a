"""LoRA on parts of layers that compute query, key and value in one."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import peft
import pytest
import torch
import transformers as t
from families import SMALL, build, outputs, randomise
from modules import assert_same
from resuming import straight_and_resumed
from test_hosts import assert_merges, seeded
from torch import Tensor, nn

from lightning_peft import (
    DoRA,
    LoRA,
    PEFTError,
    adapter_state_dict,
    inject,
    load_adapter,
    merge,
    save_adapter,
    unmerge,
)

BASE = {k: v for k, v in SMALL.items() if k != "intermediate_size"}
MODELS: dict[str, tuple[str, Any]] = {
    "gpt2": ("c_attn", lambda: build("gpt2")[0]),
    "phi3": ("qkv_proj", lambda: build("phi3")[0]),
    "gpt_neox": ("query_key_value", lambda: build("gpt_neox")[0]),
    "bloom": ("query_key_value", lambda: build("bloom")[0]),
    "falcon with one key": ("query_key_value", lambda: build("falcon")[0]),
    "falcon with groups": (
        "query_key_value",
        lambda: t.FalconForCausalLM(t.FalconConfig(**BASE, new_decoder_architecture=True, num_kv_heads=2)),
    ),
    "falcon with a key for each": (
        "query_key_value",
        lambda: t.FalconForCausalLM(t.FalconConfig(**BASE, multi_query=False)),
    ),
}
IDS = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))


def call(model: nn.Module) -> Tensor:
    logits: Tensor = model(input_ids=IDS).logits
    return logits


@torch.no_grad()
def cached(model: nn.Module) -> dict[str, Tensor]:
    """What the model itself takes for keys and values in its first layer, and its logits."""
    result = model(input_ids=IDS, use_cache=True)
    layer = result.past_key_values.layers[0]
    return {"k": layer.keys, "v": layer.values, "logits": result.logits}


@pytest.mark.parametrize("part", ["q", "k", "v"])
@pytest.mark.parametrize("name", MODELS)
def test_the_rows_are_what_the_model_takes_them_for(name: str, part: str) -> None:
    leaf, make = MODELS[name]
    model = seeded(make)
    before = cached(model)
    assert len(inject(model, LoRA(r=2, target_modules=leaf, layers=[0], fused_parts=[part]))) == 1
    assert all(torch.equal(value, before[key]) for key, value in cached(model).items())
    randomise(model)
    after = cached(model)
    for key in "kv":
        changed = (after[key] - before[key]).abs() > 1e-9
        # Of a part that is adapted every feature of every head changes, of others none.
        assert changed.all() if key == part else not changed.any()
    assert (after["logits"] - before["logits"]).abs().max() > 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_parts_merge_and_are_written_for_any_reader(name: str, tmp_path: Path) -> None:
    leaf, make = MODELS[name]
    method = LoRA(r=2, alpha=6, target_modules=[leaf], fused_parts=["q", "v"], use_rslora=name == "phi3")
    assert_merges(make, call, method)
    model = seeded(make)
    inject(model, method)
    randomise(model)
    save_adapter(model, tmp_path / "ours")
    expected = call(model)
    judge = peft.PeftModel.from_pretrained(seeded(make), tmp_path / "ours", autocast_adapter_dtype=False).eval()
    assert (call(judge) - expected).abs().max() <= 1e-9
    # Read without a method, it is a LoRA of the whole layer with the same effect.
    plain = seeded(make)
    load_adapter(plain, tmp_path / "ours")
    assert (call(plain) - expected).abs().max() <= 1e-9
    # Read into the same method, it is what it was.
    again = seeded(make)
    inject(again, method, seed=5)
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(call(again), expected)
    ours, theirs = ({n: p for n, p in m.state_dict().items() if ".peft." in n} for m in (model, again))
    assert_same(ours, theirs)


@pytest.mark.parametrize("conv1d", [True, False])
def test_loralibs_merged_linear(conv1d: bool) -> None:
    """Outputs and gradients of ``MergedLinear``, by its formula: three thirds of which the second stays as it is."""
    model = seeded(MODELS["gpt2"][1])
    inject(model, LoRA(r=2, alpha=6, target_modules="c_attn", layers=[0], fused_parts=["v", "q"]))
    randomise(model)
    host = model.get_submodule("transformer.h.0.attn.c_attn")
    adapter = host.get_submodule("peft.default")
    assert adapter.lora_A.shape == (4, 32)
    assert adapter.lora_B.shape == (64, 2)
    x = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, b = (p.detach().clone().requires_grad_() for p in (adapter.lora_A, adapter.lora_B))
    weight, bias = host.weight.detach().T, host.bias.detach()
    if conv1d:
        delta = nn.functional.conv1d(a[None], b[..., None], groups=2)[0]
        padded = torch.cat([delta[:32], torch.zeros(32, 32, dtype=torch.float64), delta[32:]])
    else:
        padded = torch.cat([b[:32] @ a[:2], torch.zeros(32, 32, dtype=torch.float64), b[32:] @ a[2:]])
    expected = x @ (weight + 3 * padded).T + bias
    assert (host(x) - expected).abs().max() <= 1e-12
    ours = torch.autograd.grad(host(x).square().sum(), [adapter.lora_A, adapter.lora_B])
    theirs = torch.autograd.grad(expected.square().sum(), [a, b])
    assert all((o - u).abs().max() <= 1e-9 * u.abs().max() for o, u in zip(ours, theirs, strict=True))


def test_the_layer_of_loralib() -> None:
    loralib = pytest.importorskip("loralib")
    model = seeded(MODELS["gpt2"][1])
    inject(model, LoRA(r=2, alpha=6, target_modules="c_attn", layers=[0], fused_parts=["q", "v"]))
    randomise(model)
    host = model.get_submodule("transformer.h.0.attn.c_attn")
    judge = loralib.MergedLinear(
        32, 96, r=2, lora_alpha=6, enable_lora=[True, False, True], merge_weights=False
    ).double()
    adapter = host.get_submodule("peft.default")
    judge.load_state_dict(
        {"weight": host.weight.T, "bias": host.bias, "lora_A": adapter.lora_A, "lora_B": adapter.lora_B}
    )
    x = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert (host(x) - judge(x)).abs().max() <= 1e-12


def test_the_papers_count() -> None:
    with torch.device("meta"):
        model = t.GPT2LMHeadModel(t.GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    inject(model, LoRA(r=4, target_modules="c_attn", fused_parts=["q", "v"]))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 24 * 2 * 4 * 2048 == 393_216


def test_other_layers_are_adapted_whole_beside_them() -> None:
    model, inputs = build("falcon")
    names = inject(model, LoRA(r=2, fused_parts=["q", "v"]))
    randomise(model)
    kinds = {name.rpartition(".")[2]: type(model.get_submodule(f"{name}.peft.default")).__name__ for name in names}
    assert kinds["query_key_value"] == "FusedLoRAAdapter"
    assert {kinds[leaf] for leaf in ("dense", "dense_h_to_4h", "dense_4h_to_h")} == {"LoRAAdapter"}
    outputs(model, inputs).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    expected = outputs(model, inputs)
    merge(model)
    assert (outputs(model, inputs) - expected).abs().max() <= 1e-5


def test_an_adapter_that_changes_other_parts_is_not_read_into_some(tmp_path: Path) -> None:
    model = build("gpt2")[0]
    inject(model, LoRA(r=4, target_modules="c_attn"))
    randomise(model)
    save_adapter(model, tmp_path / "whole")
    fresh = build("gpt2")[0]
    inject(fresh, LoRA(r=2, target_modules="c_attn", fused_parts=["q", "v"]))
    with pytest.raises(PEFTError, match="changes parts of the layer that fused_parts leaves out"):
        load_adapter(fresh, tmp_path / "whole")


@pytest.mark.parametrize("given", [[], ["q", "q"], ["o"], "qx"])
def test_parts_that_are_none(given: Any) -> None:
    with pytest.raises(PEFTError, match=r"fused_parts=.* was given; a list of 'q', 'k', 'v' was expected"):
        LoRA(fused_parts=given)


def test_what_has_no_known_parts_is_refused() -> None:
    with pytest.raises(PEFTError, match="DoRA adapts whole layers"):
        DoRA(fused_parts=["q"])
    with pytest.raises(PEFTError, match="no adapted layer computes query, key and value in one"):
        inject(build("llama")[0], LoRA(r=2, fused_parts=["q"]))
    plain = nn.Sequential()
    plain.add_module("attn", nn.ModuleDict({"qkv": nn.Linear(8, 24)}))
    with pytest.raises(PEFTError, match=r"'attn\.qkv' \(8 → 24, in a model of type None\) is not known"):
        inject(plain, LoRA(r=2, target_modules="qkv", fused_parts=["q"]))
    config = t.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=50, add_cross_attention=True)
    with pytest.raises(PEFTError, match=r"crossattention\.c_attn' \(32 → 64.* is not known"):
        inject(t.GPT2LMHeadModel(config), LoRA(r=2, target_modules="c_attn", fused_parts=["q"]))


class GPT2(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = build("gpt2")[0]
        for part in self.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0  # a run that goes on would draw others

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        ids = torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(self.global_step))
        loss: Tensor = self.model(input_ids=ids, labels=ids).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def test_a_run_goes_on_with_the_same_parts(tmp_path: Path) -> None:
    method = LoRA(r=2, target_modules="c_attn", fused_parts=["q", "v"])
    straight, resumed = straight_and_resumed(tmp_path, GPT2, method)
    assert_same(dict(adapter_state_dict(straight)), dict(adapter_state_dict(resumed)))
    unmerge(straight)
    loaded = GPT2.load_from_checkpoint(tmp_path / "straight" / "last")
    assert_same(dict(adapter_state_dict(straight)), dict(adapter_state_dict(loaded)))
    plain = GPT2()
    load_adapter(plain, tmp_path / "straight" / "last")
    assert (call(plain.model.eval()) - call(straight.model.eval())).abs().max() <= 1e-5
