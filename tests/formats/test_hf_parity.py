"""HF PEFT as the judge: files both ways, outputs, gradients, merged weights."""

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import peft
import pytest
import torch
from families import FAMILIES, build, outputs, randomise
from judges.hf_peft import IA3_TARGETS
from modules import Llama
from safetensors.torch import load_file, save_file
from strangers import unsealed
from torch import nn

from lightning_peft import (
    BEFT,
    IA3,
    OFT,
    AdaLoRA,
    LayerNormTuning,
    LoHa,
    LoKr,
    LoRA,
    MiSS,
    PEFTError,
    PEFTMethod,
    VeRA,
    inject,
    load_adapter,
    merge,
    save_adapter,
)
from lightning_peft.core.view import ModelView

TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "bert": ["query", "value"],
    "t5": ["q", "wo"],
    "qwen2": ["q_proj", "v_proj"],
    "qwen3": ["q_proj", "gate_proj"],
    "gemma3": ["q_proj", "embed_tokens"],
    "vit": ["query", "value"],
    "sequential": ["0", "2"],
}
EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 5.0}},
}


def targets_in(model: nn.Module, family: str) -> list[str]:
    leaves = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    names = [name for name in TARGETS[family] if name in leaves]
    # transformers has renamed ViT's projections.
    return names or ["q_proj", "v_proj"]


def ours(family: str, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = build(family)
    inject(model, LoRA(r=4, alpha=12, target_modules=targets_in(model, family), **options))
    randomise(model)
    return model, inputs


def theirs(family: str, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = build(family)
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets_in(model, family), **options)
    judge = peft.get_peft_model(model, config).eval()
    randomise(judge)
    return judge, inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_our_adapter_in_peft(family: str, tmp_path: Path) -> None:
    model, inputs = ours(family)
    expected = outputs(model, inputs)
    assert (expected - outputs(build(family)[0], inputs)).abs().max() > 1e-4
    save_adapter(model, tmp_path / "adapter")
    judge = peft.PeftModel.from_pretrained(build(family)[0], tmp_path / "adapter").eval()
    assert (outputs(judge, inputs) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_their_adapter_in_ours(family: str, tmp_path: Path) -> None:
    judge, inputs = theirs(family)
    judge.save_pretrained(tmp_path / "adapter")
    model = build(family)[0]
    load_adapter(model, tmp_path / "adapter")
    assert (outputs(model, inputs) - outputs(judge, inputs)).abs().max() <= 1e-5
    assert (outputs(model, inputs) - outputs(build(family)[0], inputs)).abs().max() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_theirs(family: str, tmp_path: Path) -> None:
    model, inputs = ours(family)
    save_adapter(model, tmp_path / "adapter")
    judge = peft.PeftModel.from_pretrained(build(family)[0], tmp_path / "adapter", is_trainable=True).eval()
    outputs(model, inputs).pow(2).sum().backward()
    outputs(judge, inputs).pow(2).sum().backward()
    found = {n: p.grad for n, p in judge.named_parameters() if p.requires_grad}
    compared = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        host, letter = name.split(".peft.default.lora_")
        embedding = isinstance(model.get_submodule(host), nn.Embedding)
        key = f"lora_embedding_{letter}.default" if embedding else f"lora_{letter}.default.weight"
        gradient = found[f"base_model.model.{host}.{key}"]
        scale = gradient.abs().max().clamp(min=1.0)
        assert gradient.abs().max() > 0, name
        assert ((parameter.grad - gradient).abs().max() / scale) <= 1e-5, name
        compared += 1
    assert compared == len(found) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_weights_are_theirs(family: str, tmp_path: Path) -> None:
    model, inputs = build(family)
    # peft merges an adapted embedding into the tied head as well, so it is no judge of that.
    inject(model, LoRA(r=4, target_modules=[t for t in targets_in(model, family) if t != "embed_tokens"]))
    randomise(model)
    save_adapter(model, tmp_path / "adapter")
    before = outputs(model, inputs)
    judge = peft.PeftModel.from_pretrained(build(family)[0], tmp_path / "adapter").eval().merge_and_unload()
    merge(model, unload=True)
    assert (outputs(model, inputs) - before).abs().max() <= 1e-5
    expected = judge.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert (tensor - expected[name]).abs().max() <= 1e-6, name


@pytest.mark.parametrize("extra", EXTRAS)
def test_scaling_and_patterns(extra: str, tmp_path: Path) -> None:
    model, inputs = ours("llama", **EXTRAS[extra])
    save_adapter(model, tmp_path / "ours")
    judge = peft.PeftModel.from_pretrained(build("llama")[0], tmp_path / "ours").eval()
    assert (outputs(judge, inputs) - outputs(model, inputs)).abs().max() <= 1e-5
    judge, inputs = theirs("llama", **EXTRAS[extra])
    judge.save_pretrained(tmp_path / "theirs")
    loaded = build("llama")[0]
    load_adapter(loaded, tmp_path / "theirs")
    assert (outputs(loaded, inputs) - outputs(judge, inputs)).abs().max() <= 1e-5


def test_modules_trained_whole(tmp_path: Path) -> None:
    model, inputs = build("bert")
    inject(model, LoRA(r=4, target_modules=["query", "value"]), train_also=["classifier"])
    randomise(model)
    save_adapter(model, tmp_path / "ours")
    judge = peft.PeftModel.from_pretrained(build("bert")[0], tmp_path / "ours").eval()
    assert (outputs(judge, inputs) - outputs(model, inputs)).abs().max() <= 1e-5
    judge.save_pretrained(tmp_path / "theirs")
    loaded = build("bert")[0]
    load_adapter(loaded, tmp_path / "theirs")
    assert (outputs(loaded, inputs) - outputs(model, inputs)).abs().max() <= 1e-5
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["modules_to_save"] == ["classifier"]


def near_one(model: nn.Module) -> None:
    randomise(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)


@pytest.mark.parametrize("family", IA3_TARGETS)
def test_ia3_both_ways(family: str, tmp_path: Path) -> None:
    model, inputs = build(family)
    inject(model, IA3())
    near_one(model)
    save_adapter(model, tmp_path / "ours")
    judge = peft.PeftModel.from_pretrained(build(family)[0], tmp_path / "ours", is_trainable=True).eval()
    assert (outputs(model, inputs) - outputs(build(family)[0], inputs)).abs().max() > 1e-5
    assert (outputs(judge, inputs) - outputs(model, inputs)).abs().max() <= 1e-5
    outputs(model, inputs).square().sum().backward()
    outputs(judge, inputs).square().sum().backward()
    theirs = {name: p.grad for name, p in judge.named_parameters() if p.requires_grad}
    ours = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(theirs) == len(ours) > 0
    for name, gradient in ours.items():
        other = theirs[f"base_model.model.{name.split('.peft.')[0]}.ia3_l.default"]
        assert (gradient - other).abs().max() <= 1e-5 * other.abs().max().clamp(min=1.0), name

    targets, feedforward = IA3_TARGETS[family]
    config = peft.IA3Config(target_modules=targets, feedforward_modules=feedforward)
    judge = peft.get_peft_model(build(family)[0], config).eval()
    near_one(judge)
    judge.save_pretrained(tmp_path / "theirs")
    loaded = build(family)[0]
    load_adapter(loaded, tmp_path / "theirs")
    assert (outputs(loaded, inputs) - outputs(judge, inputs)).abs().max() <= 1e-5
    fresh = build(family)[0]
    inject(fresh, IA3())
    load_adapter(fresh, tmp_path / "theirs")
    assert torch.equal(outputs(fresh, inputs), outputs(loaded, inputs))
    expected, plain = outputs(loaded, inputs), judge.merge_and_unload()
    merge(loaded, unload=True)
    assert (outputs(loaded, inputs) - expected).abs().max() <= 1e-5
    for name, tensor in loaded.state_dict().items():
        assert (tensor - plain.state_dict()[name]).abs().max() <= 1e-6, name


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_layer_norms_both_ways(family: str, tmp_path: Path) -> None:
    model, inputs = build(family)
    inject(model, LayerNormTuning())
    near_one(model)
    save_adapter(model, tmp_path / "ours")
    judge = peft.PeftModel.from_pretrained(build(family)[0], tmp_path / "ours").eval()
    assert (outputs(model, inputs) - outputs(build(family)[0], inputs)).abs().max() > 1e-4
    assert (outputs(judge, inputs) - outputs(model, inputs)).abs().max() <= 1e-5
    targets = {"llama": ["input_layernorm", "norm"], "gpt2": ["ln_1", "ln_f"], "bert": ["LayerNorm"]}[family]
    judge = peft.get_peft_model(build(family)[0], peft.LNTuningConfig(target_modules=targets)).eval()
    near_one(judge)
    judge.save_pretrained(tmp_path / "theirs")
    loaded = build(family)[0]
    load_adapter(loaded, tmp_path / "theirs")
    assert (outputs(loaded, inputs) - outputs(judge, inputs)).abs().max() <= 1e-5
    assert (outputs(loaded, inputs) - outputs(build(family)[0], inputs)).abs().max() > 1e-4


@pytest.mark.parametrize("method", [IA3(target_modules=["query"]), LayerNormTuning()], ids=["ia3", "norms"])
def test_other_methods_with_modules_trained_whole(method: PEFTMethod, tmp_path: Path) -> None:
    model, inputs = build("bert")
    inject(model, method, train_also=["classifier"])
    near_one(model)
    save_adapter(model, tmp_path / "ours")
    judge = peft.PeftModel.from_pretrained(build("bert")[0], tmp_path / "ours").eval()
    assert (outputs(judge, inputs) - outputs(model, inputs)).abs().max() <= 1e-5
    loaded = build("bert")[0]
    load_adapter(loaded, tmp_path / "ours")
    assert torch.equal(outputs(loaded, inputs), outputs(model, inputs))


LAYER = "model.model.layers.0"
NAMED: dict[str, PEFTMethod] = {
    "lora": LoRA(
        r=2,
        target_modules=[f"{LAYER}.self_attn.q_proj", "v_proj"],
        rank_pattern={f"{LAYER}.self_attn.q_proj": 1},
        alpha_pattern={r"re:model\.model\..*v_proj": 7},
    ),
    "lora by layers": LoRA(r=2, target_modules="attention", layers=[1], rank_pattern={"model.**.o_proj": 1}),
    "ia3": IA3(target_modules=[f"{LAYER}.mlp.down_proj", "k_proj"], feedforward_modules=[f"{LAYER}.mlp.down_proj"]),
    "adalora": AdaLoRA(init_r=3, target_r=1, target_modules=["q_proj"], rank_pattern={f"{LAYER}.self_attn.q_proj": 2}),
}


@pytest.mark.parametrize("name", NAMED)
def test_names_in_a_lightning_module_are_none_of_the_file(name: str, tmp_path: Path) -> None:
    """Patterns name modules as the user's module does; the file is for the model inside it."""
    module, ids = Llama(), torch.arange(6)[None]
    inject(module, NAMED[name])
    for parameter in module.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    save_adapter(module, tmp_path / "adapter")
    expected = module.model(input_ids=ids).logits
    judge = peft.PeftModel.from_pretrained(Llama().model, tmp_path / "adapter").eval()
    assert (judge(input_ids=ids).logits - expected).abs().max() < 1e-5
    assert (expected - Llama().model(input_ids=ids).logits).abs().max() > 1e-3
    for whole in (True, False):
        fresh = Llama()
        load_adapter(fresh if whole else fresh.model, tmp_path / "adapter")
        assert torch.equal(fresh.model(input_ids=ids).logits, expected)


def test_patterns_for_one_of_several_models(tmp_path: Path) -> None:
    module = nn.ModuleDict({"a": Llama().model, "b": Llama().model})
    inject(module, LoRA(r=2, target_modules=["a.**.q_proj", "b.**.v_proj"], rank_pattern={"a.**.q_proj": 1}))
    randomise(module)
    holder = pl.LightningModule()
    holder.models = module
    save_adapter(holder, tmp_path / "adapter")
    ids = torch.arange(6)[None]
    for name in "ab":
        judge = peft.PeftModel.from_pretrained(Llama().model, tmp_path / "adapter" / f"models.{name}").eval()
        assert (judge(input_ids=ids).logits - module[name](input_ids=ids).logits).abs().max() < 1e-5


LOST: dict[str, PEFTMethod] = {
    "lora": LoRA(r=2, target_modules=["q_proj", "v_proj"]),
    "adalora": AdaLoRA(target_modules=["q_proj", "v_proj"]),
    "ia3": IA3(target_modules=["q_proj", "v_proj"], feedforward_modules=[]),
    "loha": LoHa(r=2, target_modules=["q_proj", "v_proj"]),
    "lokr": LoKr(r=2, target_modules=["q_proj", "v_proj"]),
    "beft": BEFT(target_modules=["q_proj", "v_proj"]),
    "miss": MiSS(r=4, target_modules=["q_proj", "v_proj"]),
    "oft": OFT(block_size=4, target_modules=["q_proj", "v_proj"]),
    "vera": VeRA(r=2, target_modules=["q_proj", "v_proj"]),
    "norms": LayerNormTuning(),
}


@pytest.mark.parametrize("name", LOST)
def test_a_module_whose_tensors_are_lost_is_missed(name: str, tmp_path: Path) -> None:
    """Also in files of others, whose configuration alone says what was adapted."""
    model, _ = build("llama")
    inject(model, LOST[name])
    save_adapter(model, tmp_path / "a")
    lost = "model.layers.1.input_layernorm" if name == "norms" else "model.layers.1.self_attn.v_proj"
    (unsealed(tmp_path / "a") / "lightning_peft.json").unlink()
    load_adapter(build("llama")[0], tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    kept = {key: tensor for key, tensor in load_file(file).items() if lost not in key}
    save_file(kept, file)
    fresh, _ = build("llama")
    with pytest.raises(PEFTError, match=rf"'{lost}' is adapted .* no tensors for it"):
        load_adapter(fresh, tmp_path / "a")
    assert not ModelView(fresh).slots


def test_what_a_configuration_excludes_is_not_missed(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], exclude_modules=r".*layers\.1.*v_proj")
    judge = peft.get_peft_model(build("llama")[0], config)
    judge.save_pretrained(tmp_path)
    model, _ = build("llama")
    load_adapter(model, tmp_path)
    assert len(ModelView(model).slots) == 3


@pytest.mark.parametrize(("family", "target"), [("gpt2", "c_attn"), ("t5", "q"), ("gemma3", "q_proj")])
def test_lora_on_a_tied_head(family: str, target: str, tmp_path: Path) -> None:
    """Their files hold a copy of the head's weight, which is the embedding's."""
    model, inputs = build(family)
    judge = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[target, "lm_head"])).eval()
    randomise(judge)
    judge.save_pretrained(tmp_path / "theirs")
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    loaded = build(family)[0]
    load_adapter(loaded, tmp_path / "theirs")
    assert (outputs(loaded, inputs) - outputs(judge, inputs)).abs().max() <= 1e-5
    save_adapter(loaded, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(build(family)[0], tmp_path / "ours").eval()
    assert (outputs(again, inputs) - outputs(judge, inputs)).abs().max() <= 1e-5


def without_safetensors(directory: Path) -> Path:
    """Rewrite their directory as HF PEFT wrote it before safetensors."""
    file = directory / "adapter_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    return file.with_suffix(".bin")


def test_a_head_that_the_task_implies_in_a_pickle(tmp_path: Path) -> None:
    """As HF PEFT 0.5 wrote classifiers."""
    model, inputs = build("bert")
    judge = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")).eval()
    randomise(judge)
    judge.save_pretrained(tmp_path)
    without_safetensors(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": None}))
    loaded = build("bert")[0]
    load_adapter(loaded, tmp_path)
    assert (outputs(loaded, inputs) - outputs(judge, inputs)).abs().max() <= 1e-5
    assert (outputs(loaded, inputs) - outputs(build("bert")[0], inputs)).abs().max() > 1e-3


class Called:
    """Pickles as a call of a function."""

    def __reduce__(self) -> Any:
        return print, ("a stranger's code",)


def compressed(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda file: torch.save({"a": Called()}, file),
            "cannot be read as tensors: it holds print, which is no tensor",
        ),
        (lambda file: torch.save({"a": 1}, file), "other things than tensors"),
        (lambda file: torch.save([torch.ones(1)], file), "other things than tensors"),
        (lambda file: file.write_bytes(pickle.dumps(Called())), "cannot be read as tensors"),
        (lambda file: file.write_bytes(file.read_bytes()[:-100]), "cannot be read as tensors"),
        (compressed, "it is compressed"),
    ],
    ids=["code", "no tensors", "a list", "a bare pickle", "truncated", "compressed"],
)
def test_pickles_are_read_as_data(
    spoil: Callable[[Path], None], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = build("llama")
    inject(model, LoRA(r=2))
    save_adapter(model, tmp_path / "a")
    spoil(without_safetensors(unsealed(tmp_path / "a")))
    with pytest.raises(PEFTError, match=message) as refused:
        load_adapter(build("llama")[0], tmp_path / "a")
    # torch says what to pass to have it run.
    assert "weights_only" not in str(refused.value)
    assert "stranger" not in capsys.readouterr().out


def test_a_configuration_that_names_other_modules(tmp_path: Path) -> None:
    """HF PEFT passes a name too many over. Tensors that no name is for it would not load: they are refused."""
    model, inputs = build("llama")
    judge = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    randomise(judge)
    judge.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "target_modules": ["q_proj", "v_proj", "nowhere"]}))
    again = peft.PeftModel.from_pretrained(build("llama")[0], tmp_path)
    ours, _ = build("llama")
    load_adapter(ours, tmp_path)
    assert (outputs(ours.eval(), inputs) - outputs(again.eval(), inputs)).abs().max() <= 1e-5
    for targets in (["nowhere"], "nowhere", ["q_proj"]):
        file.write_text(json.dumps({**config, "target_modules": targets}))
        ours, _ = build("llama")
        with pytest.raises(PEFTError, match=r"has tensors for '.*_proj', which its configuration does not name"):
            load_adapter(ours, tmp_path)
        assert not ModelView(ours).slots
