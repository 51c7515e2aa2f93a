"""Serving copies: HF PEFT as the judge of the copy, and readers that scale by simpler rules than HF PEFT does."""

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import build, outputs, randomise
from safetensors.torch import load_file, save_file
from strangers import unsealed
from torch import Tensor, nn

from lightning_peft import LoRA, PEFTError, inject, load_adapter, save_adapter
from lightning_peft.cli import main
from lightning_peft.cli.tools.export import export

PATTERNS: dict[str, Any] = {
    "use_rslora": True,
    "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 8},
    "alpha_pattern": {"down_proj": 5.0},
}
TARGETS = ["q_proj", "v_proj", "down_proj"]


def ours(path: Path, family: str = "llama", targets: Any = TARGETS, **options: Any) -> Tensor:
    """Write an adapter of this package and return the outputs that it gives."""
    model, inputs = build(family)
    inject(model, LoRA(r=4, alpha=12, target_modules=targets, **options))
    randomise(model)
    save_adapter(model, path)
    return outputs(model, inputs)


def theirs(path: Path, family: str = "llama", **options: Any) -> Tensor:
    """The same by HF PEFT."""
    model, inputs = build(family)
    settings = {"r": 4, "lora_alpha": 12, "target_modules": TARGETS, **options}
    judge = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
    randomise(judge)
    judge.save_pretrained(path)
    return outputs(judge, inputs)


def read_by_peft(path: Path, family: str = "llama") -> Tensor:
    model, inputs = build(family)
    return outputs(peft.PeftModel.from_pretrained(model, path).eval(), inputs)


def naive_outputs(path: Path, *, rank_from_tensors: bool, family: str = "llama") -> Tensor:
    """Merge as a simple server does: scale = lora_alpha / r, of the configuration alone or with the tensors' rank."""
    config = json.loads((path / "adapter_config.json").read_text())
    tensors = load_file(path / "adapter_model.safetensors")
    model, inputs = build(family)
    pairs = 0
    with torch.no_grad():
        for name, a in tensors.items():
            if not name.endswith(".lora_A.weight"):
                continue
            b = tensors[name.replace("lora_A", "lora_B")]
            scale = config["lora_alpha"] / (len(a) if rank_from_tensors else config["r"])
            module = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            assert isinstance(module, nn.Linear)
            module.weight += scale * b.float() @ a.float()
            pairs += 1
    assert pairs
    return outputs(model, inputs)


def change(path: Path, **keys: Any) -> None:
    file = unsealed(path) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def config_at(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / "adapter_config.json").read_text())
    return content


@pytest.mark.parametrize("rank", [None, 8, 16])
@pytest.mark.parametrize("writer", [ours, theirs])
def test_every_reader_computes_the_same(writer: Any, rank: int | None, tmp_path: Path) -> None:
    expected = writer(tmp_path / "adapter", **PATTERNS)
    effect = (expected - outputs(*build("llama"))).abs().max()
    assert effect > 0.01
    export(str(tmp_path / "adapter"), str(tmp_path / "copy"), rank=rank)
    assert (read_by_peft(tmp_path / "copy") - expected).abs().max() <= 1e-5
    for from_tensors in (False, True):
        naive = naive_outputs(tmp_path / "copy", rank_from_tensors=from_tensors)
        assert (naive - expected).abs().max() <= 1e-5
        wrong = naive_outputs(tmp_path / "adapter", rank_from_tensors=from_tensors)
        assert (wrong - expected).abs().max() > 0.1 * effect
    config = config_at(tmp_path / "copy")
    assert config["r"] == config["lora_alpha"] == (rank or 8)
    assert not config["use_rslora"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["target_modules"] == sorted(TARGETS)


def test_all_tensors_have_the_one_rank_and_zeros_beyond_their_own(tmp_path: Path) -> None:
    ours(tmp_path / "adapter", **PATTERNS)
    export(str(tmp_path / "adapter"), str(tmp_path / "copy"), rank=16)
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "copy"))
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        own = before[name].shape[0 if "lora_A" in name else 1]
        kept, added = (tensor[:own], tensor[own:]) if "lora_A" in name else (tensor[:, :own], tensor[:, own:])
        assert added.numel() > 0
        assert not added.any()
        if "lora_A" in name:
            assert torch.equal(kept, before[name])
        else:
            alpha = 5.0 if "down_proj" in name else 12
            torch.testing.assert_close(kept, before[name] * alpha / math.sqrt(own), rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_conv1d_and_embeddings(family: str, tmp_path: Path) -> None:
    targets = {"gpt2": ["c_attn", "c_fc"], "gemma3": ["q_proj", "embed_tokens"]}[family]
    expected = ours(tmp_path / "ours", family, targets)
    export(str(tmp_path / "ours"), str(tmp_path / "copy"), rank=8)
    assert (read_by_peft(tmp_path / "copy", family) - expected).abs().max() <= 1e-5
    assert config_at(tmp_path / "copy")["fan_in_fan_out"] is (family == "gpt2")
    # HF PEFT writes a copy of the embedding's weight beside the adapter.
    expected = theirs(tmp_path / "theirs", family, target_modules=targets)
    export(str(tmp_path / "theirs"), str(tmp_path / "copy"), rank=8)
    assert (read_by_peft(tmp_path / "copy", family) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"layers": [1]}, "model.layers.1.self_attn.q_proj"),
        ({"exclude_modules": ["layers.0.self_attn.q_proj"]}, "model.layers.1.self_attn.q_proj"),
        ({}, "q_proj"),
    ],
    ids=["layers", "exclude", "all"],
)
def test_targets_name_what_is_adapted_and_nothing_else(options: dict[str, Any], expected: str, tmp_path: Path) -> None:
    logits = ours(tmp_path / "adapter", targets=["q_proj"], **options)
    export(str(tmp_path / "adapter"), str(tmp_path / "copy"))
    assert config_at(tmp_path / "copy")["target_modules"] == [expected]
    assert (read_by_peft(tmp_path / "copy") - logits).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"layers_to_transform": [1]},
        {"exclude_modules": ["model.layers.0.self_attn.q_proj"]},
        {"target_modules": r".*\.1\.self_attn\.(q|v)_proj"},
    ],
    ids=["layers", "exclude", "expression"],
)
def test_restrictions_of_peft_are_kept(options: dict[str, Any], tmp_path: Path) -> None:
    expected = theirs(tmp_path / "adapter", **options)
    export(str(tmp_path / "adapter"), str(tmp_path / "copy"))
    model, inputs = build("llama")
    judge = peft.PeftModel.from_pretrained(model, tmp_path / "copy").eval()
    assert (outputs(judge, inputs) - expected).abs().max() <= 1e-5
    hosts = {name for name, _ in judge.named_parameters() if "lora_A" in name}
    assert len(hosts) == len([n for n in load_file(tmp_path / "copy" / "adapter_model.safetensors") if "lora_A" in n])


def test_the_copy_loads_here_and_knows_its_base(tmp_path: Path) -> None:
    expected = ours(tmp_path / "adapter", **PATTERNS)
    export(str(tmp_path / "adapter"), str(tmp_path / "copy"), rank=8)
    model, inputs = build("llama")
    load_adapter(model, tmp_path / "copy")
    assert (outputs(model, inputs) - expected).abs().max() <= 1e-5
    other, _ = build("llama")
    randomise(other)
    with pytest.raises(PEFTError):
        load_adapter(other, tmp_path / "copy")


def test_dtype(tmp_path: Path) -> None:
    expected = ours(tmp_path / "adapter", **PATTERNS)
    effect = (expected - outputs(*build("llama"))).abs().max()
    export(str(tmp_path / "adapter"), str(tmp_path / "copy"), dtype="bfloat16")
    tensors = load_file(tmp_path / "copy" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    # bfloat16 has 8 significant bits: 2⁻⁹ of each factor, and the deltas of many layers add up.
    assert (naive_outputs(tmp_path / "copy", rank_from_tensors=True) - expected).abs().max() < 0.05 * effect
    export(str(tmp_path / "copy"), str(tmp_path / "again"))
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours(tmp_path / "adapter", **PATTERNS)
    with pytest.raises(SystemExit) as stop:
        main(["export", str(tmp_path / "adapter"), f"--out={tmp_path / 'copy'}", "--rank=32", "--dtype=float16"])
    assert stop.value.code == 0
    assert "rank 32" in capsys.readouterr().out
    assert config_at(tmp_path / "copy")["r"] == 32


# Bad input


def refused(source: Path, out: Path, **options: Any) -> str:
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    with pytest.raises(PEFTError) as error:
        export(str(source), str(out), **options)
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    return str(error.value)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_plain_lora_is_refused(options: dict[str, Any], named: str, tmp_path: Path) -> None:
    theirs(tmp_path / "adapter", **options)
    assert named in refused(tmp_path / "adapter", tmp_path / "copy")


def test_another_method_of_peft_is_refused(tmp_path: Path) -> None:
    model, _ = build("llama")
    config = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    assert "IA3" in refused(tmp_path / "adapter", tmp_path / "copy")


def test_modules_trained_whole_are_refused(tmp_path: Path) -> None:
    model, _ = build("bert")
    inject(model, LoRA(target_modules=["query", "value"]), train_also=["classifier"])
    save_adapter(model, tmp_path / "adapter")
    assert "lightning-peft merge" in refused(tmp_path / "adapter", tmp_path / "copy")
    # An entry that a hand has taken out of the configuration leaves the tensors.
    change(tmp_path / "adapter", modules_to_save=None)
    assert "classifier.bias" in refused(tmp_path / "adapter", tmp_path / "copy")


def test_wrong_ranks(tmp_path: Path) -> None:
    ours(tmp_path / "adapter", **PATTERNS)
    assert "vLLM serves 1, 8, 16" in refused(tmp_path / "adapter", tmp_path / "copy", rank=12)
    message = refused(tmp_path / "adapter", tmp_path / "copy", rank=1)
    assert "rank 8" in message
    assert "Take 8 or more" in message


def test_damaged_adapters(tmp_path: Path) -> None:
    ours(tmp_path / "adapter", **PATTERNS)
    change(tmp_path / "adapter", r=5)
    assert "the rank 5" in refused(tmp_path / "adapter", tmp_path / "copy")
    change(tmp_path / "adapter", r=4, alpha_pattern={"down_proj": "5"})
    assert "alpha_pattern={'down_proj': '5'}" in refused(tmp_path / "adapter", tmp_path / "copy")
    change(tmp_path / "adapter", alpha_pattern={})
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = math.nan
    save_file(tensors, file)
    assert "NaN" in refused(tmp_path / "adapter", tmp_path / "copy")
    file.write_bytes(file.read_bytes()[:-8])
    assert "damaged or truncated" in refused(tmp_path / "adapter", tmp_path / "copy")
    assert "does not exist" in refused(tmp_path / "nothing", tmp_path / "copy")


def test_values_too_large_for_the_dtype(tmp_path: Path) -> None:
    ours(tmp_path / "adapter")
    change(tmp_path / "adapter", lora_alpha=1e7)
    assert "float32 or bfloat16" in refused(tmp_path / "adapter", tmp_path / "copy", dtype="float16")


def test_nothing_of_value_is_replaced(tmp_path: Path) -> None:
    ours(tmp_path / "adapter")
    ours(tmp_path / "other")
    assert "the adapter" in refused(tmp_path / "adapter", tmp_path / "adapter")
    assert "the adapter" in refused(tmp_path / "adapter", tmp_path)
    assert "no earlier export" in refused(tmp_path / "adapter", tmp_path / "other")
    for _ in range(2):
        export(str(tmp_path / "adapter"), str(tmp_path / "copy"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "copy", "other"]
