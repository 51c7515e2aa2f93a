"""What HF PEFT trains beside LoRA by keys of one configuration: biases, rows of embeddings, starts in the weight."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import build, outputs, strongly
from safetensors.torch import load_file, save_file
from strangers import unsealed
from torch import nn

from lightning_peft import BitFit, LoRA, NewTokens, PEFTError, PEFTMethod, inject, load_adapter, merge, save_adapter
from lightning_peft.core.registry import registries
from lightning_peft.core.view import ModelView


def lora(*targets: str, **options: Any) -> LoRA:
    return LoRA(r=2, alpha=3, target_modules=list(targets), **options)


# Family, methods, what is trained whole, and what the configuration says of it.
BESIDE: dict[str, tuple[str, list[PEFTMethod], list[str], dict[str, Any]]] = {
    "biases": ("bert", [lora("value"), BitFit()], [], {"bias": "all"}),
    "biases first": ("gpt2", [BitFit(), lora("c_attn")], [], {"bias": "all"}),
    "biases of hosts": (
        "bert",
        [lora("value", "dense"), BitFit(target_modules=["value", "dense"])],
        [],
        {"bias": "lora_only"},
    ),
    "other biases": ("bert", [lora("value"), BitFit(target_modules="dense")], [], {"bias": "all"}),
    "biases and a head": ("bert", [lora("value"), BitFit()], ["classifier"], {"modules_to_save": ["classifier"]}),
    "tokens": (
        "llama",
        [lora("q_proj"), NewTokens(token_indices=[5, -1])],
        [],
        {"trainable_token_indices": {"model.embed_tokens": [5, 49]}},
    ),
    "tokens of a tied head": ("gemma3", [NewTokens(token_indices=[1, 5]), lora("q_proj")], [], {"bias": "none"}),
    "tokens in two tables": (
        "gpt2",
        [
            lora("c_attn"),
            NewTokens(token_indices=[1], target_modules="wte"),
            NewTokens(token_indices=[2, 3], target_modules="wpe"),
        ],
        [],
        {"trainable_token_indices": {"transformer.wte": [1], "transformer.wpe": [2, 3]}},
    ),
    "all": ("bert", [lora("value"), NewTokens(token_indices=[7]), BitFit()], ["classifier"], {"bias": "all"}),
    "a bias of B": ("bert", [lora("value", "dense", lora_bias=True, use_rslora=True)], [], {"lora_bias": True}),
    "a bias where none was": ("llama", [lora("q_proj", lora_bias=True)], [], {"lora_bias": True}),
}


@pytest.mark.parametrize("name", BESIDE)
def test_ours_in_theirs(name: str, tmp_path: Path) -> None:
    family, methods, whole, said = BESIDE[name]
    model, inputs = build(family)
    inject(model, methods, train_also=whole)
    strongly(model)
    expected = outputs(model, inputs)
    assert (expected - outputs(build(family)[0], inputs)).abs().max() > 5e-3
    save_adapter(model, tmp_path / "a")
    assert said.items() <= json.loads((tmp_path / "a" / "adapter_config.json").read_text()).items()
    judge = peft.PeftModel.from_pretrained(build(family)[0], tmp_path / "a").eval()
    assert (outputs(judge, inputs) - expected).abs().max() <= 1e-5
    # Without our own file beside, as a hub may have it, and into the adapters that are there in another order.
    (unsealed(tmp_path / "a") / "lightning_peft.json").unlink()
    fresh, there = build(family)[0], build(family)[0]
    load_adapter(fresh, tmp_path / "a")
    assert torch.equal(outputs(fresh, inputs), expected)
    inject(there, methods[::-1], train_also=whole)
    load_adapter(there, tmp_path / "a")
    assert torch.equal(outputs(there, inputs), expected)
    merge(fresh, unload=True)
    assert (outputs(fresh, inputs) - expected).abs().max() <= 1e-5


def test_what_is_trained_goes_on_in_theirs(tmp_path: Path) -> None:
    """The key says to HF PEFT which biases to train further."""
    for family, methods, whole, _ in (BESIDE["biases"], BESIDE["biases of hosts"]):
        model, _ = build(family)
        inject(model, methods, train_also=whole)
        save_adapter(model, tmp_path / "a")
        judge = peft.PeftModel.from_pretrained(build(family)[0], tmp_path / "a", is_trainable=True)
        trained = sum(p.numel() for p in judge.parameters() if p.requires_grad)
        assert trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "all and a head": ("bert", {"target_modules": ["value"], "bias": "all", "task_type": "SEQ_CLS"}),
    "all and DoRA": ("bert", {"target_modules": ["value", "dense"], "bias": "all", "use_dora": True}),
    "all, of which there are none": ("llama", {"target_modules": ["q_proj"], "bias": "all"}),
    "tokens by name": ("gpt2", {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": [1], "wpe": [3, 2]}}),
    "a bias of B": ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True}),
    "pissa": ("llama", {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": "pissa"}),
    "olora": ("qwen2", {"target_modules": ["q_proj"], "init_lora_weights": "olora", "use_rslora": True}),
}


@pytest.mark.parametrize("name", THEIRS)
def test_theirs_in_ours_and_back(name: str, tmp_path: Path) -> None:
    family, options = THEIRS[name]
    model, inputs = build(family)
    judge = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=3, **options)).eval()
    strongly(judge)
    judge.save_pretrained(tmp_path / "theirs")
    again = peft.PeftModel.from_pretrained(build(family)[0], tmp_path / "theirs").eval()
    expected = outputs(again, inputs)
    assert (outputs(judge, inputs) - expected).abs().max() <= 1e-5
    loaded = build(family)[0]
    load_adapter(loaded, tmp_path / "theirs")
    assert (outputs(loaded, inputs) - expected).abs().max() <= 1e-5
    save_adapter(loaded, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(build(family)[0], tmp_path / "ours").eval()
    assert (outputs(back, inputs) - expected).abs().max() <= 1e-5


def test_a_start_that_was_drawn_at_random_is_refused(tmp_path: Path) -> None:
    model, _ = build("llama")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa_niter_4")
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    with pytest.raises(PEFTError, match=r"took out of the weights.*path_initial_model_for_weight_conversion"):
        load_adapter(build("llama")[0], tmp_path)


def test_what_hf_peft_has_no_key_for_is_written_in_the_own_format(tmp_path: Path) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.head = build("bert")[0], nn.Linear(2, 2)
            nn.init.ones_(self.head.weight)

    model = build("llama")[0]
    inject(model, [lora("q_proj"), BitFit(create_missing=True, target_modules="v_proj")])
    save_adapter(model, tmp_path / "added")
    # A bias outside the model that HF PEFT would be given.
    wrapped = Wrapped()
    inject(wrapped, [lora("value"), BitFit()])
    save_adapter(wrapped, tmp_path / "around")
    for name in ("added", "around"):
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert config["peft_type"] == "LIGHTNING_PEFT"
    fresh = Wrapped()
    load_adapter(fresh, tmp_path / "around")
    assert len(registries(ModelView(fresh))) == 1


@pytest.mark.parametrize(
    ("family", "methods", "lost", "message"),
    [
        ("llama", "tokens", "token_adapter", "trains rows of 'model.embed_tokens'"),
        (
            "bert",
            "a bias of B",
            "layer.1.attention.self.value.lora_B.bias",
            "'bert.encoder.layer.1.attention.self.value'",
        ),
    ],
)
def test_lost_tensors(family: str, methods: str, lost: str, message: str, tmp_path: Path) -> None:
    model, _ = build(family)
    inject(model, BESIDE[methods][1])
    save_adapter(model, tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if lost not in name}, file)
    unsealed(tmp_path / "a")
    with pytest.raises(PEFTError, match=message):
        load_adapter(build(family)[0], tmp_path / "a")


@pytest.mark.parametrize("options", [{"init": "pissa"}, {"fused_parts": ["q"]}], ids=str)
def test_a_bias_of_b_goes_with_plain_lora(options: dict[str, Any]) -> None:
    with pytest.raises(PEFTError, match=r"lora_bias=True was given.*BitFit\(\)"):
        LoRA(lora_bias=True, **options)
