"""Files of AdapterHub's package: what it saved is read with its own outputs, and what is written are its files.

That it loads these with equal outputs is printed by ``adapterhub_fixtures.py DIRECTORIES``, in its environment.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from judges.adapterhub import CASES, base, stored, under
from lightning_peft import LoRA, PEFTError, PrefixTuning, SeriesAdapter, inject, load_adapter, save_adapter
from lightning_peft.cli import main
from lightning_peft.cli.tools.export import export

SAVED = json.loads((Path(__file__).parent / "data" / "adapterhub_files.json").read_text())
LOST = [("t5", "compacter"), ("t5", "compacter++")]
"""Its file lacks what all layers share."""


def write(family: str, case: str, folder: Path, **said: Any) -> dict[str, Tensor]:
    """Write a base, and an adapter as the package saves it, with values of which it has computed outputs."""
    base(family).float().save_pretrained(folder / "base")
    (folder / "adapter").mkdir()
    config = SAVED[f"{family}/{case}"]["config"]
    config = {**config, "config": {**config["config"], **said}}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    values = under(f"{family}/{case}/adapter/")
    rule = next((value for name, value in values.items() if name.endswith("phm_rule")), None)
    tensors = {name: values.get(name, rule) for name in SAVED[f"{family}/{case}"]["names"]}
    torch.save(tensors, folder / "adapter" / "pytorch_adapter.bin")
    return tensors  # type: ignore[return-value]


def convert(folder: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["convert", str(folder / "adapter"), f"--model={folder / 'base'}", f"--out={folder / 'ours'}"])
    if stop.value.code:
        raise PEFTError(str(stop.value.code))


@pytest.mark.parametrize(("family", "case"), [case for case in CASES if case not in LOST])
def test_read_with_its_outputs_and_written_as_it_was(family: str, case: str, tmp_path: Path) -> None:
    tensors = write(family, case, tmp_path)
    convert(tmp_path)
    model = base(family)
    load_adapter(model, tmp_path / "ours")
    logits = model.double()(**under(f"{family}/input/")).logits
    assert (logits - stored()[f"{family}/{case}/logits"]).abs().max() <= 1e-14
    export(str(tmp_path / "ours"), str(tmp_path / "back"), "adapterhub", model=str(tmp_path / "base"))
    back = load_file(tmp_path / "back" / "adapter.safetensors")
    assert {name.replace(".default.", ".a.") for name in back} == tensors.keys()
    assert all(torch.equal(back[name.replace(".a.", ".default.")], tensor) for name, tensor in tensors.items())
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    theirs = SAVED[f"{family}/{case}"]["config"]
    # What it starts from is no part of what it is; Pfeiffer's are after no attention, and silu is swish.
    of_start = ("init_weights", "non_linearity", "cross_adapter")
    assert {k: v for k, v in config["config"].items() if k not in of_start} == {
        k: v for k, v in theirs["config"].items() if k not in of_start
    }
    assert config["config"]["non_linearity"].replace("silu", "swish") == theirs["config"]["non_linearity"]
    assert config["config"]["cross_adapter"] == (theirs["config"]["cross_adapter"] and theirs["config"]["mh_adapter"])
    assert (config["model_type"], config["version"]) == (theirs["model_type"], theirs["version"])


def test_a_head_beside_it(tmp_path: Path) -> None:
    write("bert", "houlsby", tmp_path)
    head = {"classifier.weight": torch.randn(2, 16), "classifier.bias": torch.randn(2)}
    torch.save(head, tmp_path / "adapter" / "pytorch_model_head.bin")
    convert(tmp_path)
    model = base("bert").float()
    load_adapter(model, tmp_path / "ours")
    assert torch.equal(dict(model.named_parameters())["classifier.weight"], head["classifier.weight"])
    torch.save({"heads.a.1.weight": torch.ones(2, 16)}, tmp_path / "adapter" / "pytorch_model_head.bin")
    with pytest.raises(PEFTError, match=r"a head with heads.a.1.weight, which this BertForSequenceClassification does"):
        convert(tmp_path)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "gate": ("houlsby", {"use_gating": True}, "use_gating=True, which no method here has"),
    "invertible": ("houlsby", {"inv_adapter": "nice"}, "inv_adapter='nice', which no method here has"),
    "norm": ("houlsby", {"ln_before": True}, "ln_before=True, which no method here has"),
    "scale": ("houlsby", {"scaling": "learned"}, "scaling='learned', a scale that is trained"),
    "activation": ("houlsby", {"non_linearity": "gelu_new"}, "non_linearity='gelu_new'; relu"),
    "behind a norm": ("houlsby", {"original_ln_before": True}, "after attention: there is none here"),
    "plus plus": ("compacter++", {"original_ln_before": True}, "and a Compacter: there is none here"),
    "lora": ("houlsby", {"architecture": "lora"}, "'lora'; call model.merge_adapter"),
    "prefix": (
        "houlsby",
        {"architecture": "prefix_tuning"},
        "in models of type gpt2, llama, mistral; this one is 'bert'",
    ),
    "union": ("houlsby", {"architecture": "union"}, "bottleneck, Compacter and prefix adapters are read"),
    "type": ("houlsby", {"is_parallel": "yes"}, "is_parallel='yes'; bool was expected"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_here_is_refused_by_name(what: str, tmp_path: Path) -> None:
    case, said, message = REFUSED[what]
    write("bert", case, tmp_path, **said)
    with pytest.raises(PEFTError, match=message):
        convert(tmp_path)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(("family", "case"), LOST)
def test_a_file_that_lacks_what_is_shared(family: str, case: str, tmp_path: Path) -> None:
    write(family, case, tmp_path)
    with pytest.raises(PEFTError, match=r"lacks the matrices that all its layers share"):
        convert(tmp_path)


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    write("bert", "houlsby", tmp_path)
    torch.save({"a": print}, tmp_path / "adapter" / "pytorch_adapter.bin")
    with pytest.raises(PEFTError, match="cannot be read as tensors"):
        convert(tmp_path)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (LoRA(r=2), "of HF PEFT's type 'LORA'"),
        (SeriesAdapter(bottleneck=4), "trains LayerNorms, for which AdapterHub's files have no place"),
        (SeriesAdapter(bottleneck=4, placement=["mlp_input"], train_norms=False), "behind attention and MLP"),
    ],
)
def test_what_it_does_not_have_is_not_written(method: Any, message: str, tmp_path: Path) -> None:
    base("llama").float().save_pretrained(tmp_path / "base")
    model = base("llama").float()
    inject(model, method)
    save_adapter(model, tmp_path / "ours")
    with pytest.raises(PEFTError, match=message):
        export(str(tmp_path / "ours"), str(tmp_path / "back"), "adapterhub", model=str(tmp_path / "base"))
    assert not (tmp_path / "back").exists()


PREFIXES = load_file(Path(__file__).parent / "data" / "adapterhub_prefixes.safetensors")


def write_prefix(name: str, folder: Path, **said: Any) -> dict[str, Tensor]:
    """Write a base, and a prefix as the package saves it, of which it has computed outputs; return its tensors."""
    base(name.partition("/")[0]).float().save_pretrained(folder / "base")
    (folder / "adapter").mkdir()
    config = SAVED[name]["config"]
    config = {**config, "config": {**config["config"], **said}}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    tensors = {n: PREFIXES[f"{name}/adapter/{n}"] for n in SAVED[name]["names"]}
    torch.save(tensors, folder / "adapter" / "pytorch_adapter.bin")
    return tensors


@pytest.mark.parametrize("name", [name for name in SAVED if "/prefix" in name])
def test_prefixes_are_read_with_their_outputs_and_written(name: str, tmp_path: Path) -> None:
    tensors = write_prefix(name, tmp_path)
    with pytest.warns(UserWarning, match=r"attn_implementation='eager' alone.*train it anew"):
        convert(tmp_path)
    family = name.partition("/")[0]
    model, inputs = base(family), under(f"{family}/input/")
    load_adapter(model, tmp_path / "ours")
    logits = model.double()(**inputs).logits
    # Eager attention has a softmax of float32.
    assert (logits - PREFIXES[f"{name}/logits"]).abs().max() <= 1e-6
    model.set_attn_implementation("eager")
    eager = model(**inputs).logits
    assert (eager - PREFIXES[f"{name}/logits"]).abs().max() <= (1e-6 if "mlp" in name else 1e-14)
    model.set_attn_implementation("sdpa")
    assert (logits - base(family)(**inputs).logits).abs().max() > 0.1
    # Token by token too.
    for rows in (slice(0, 1), slice(1, 2)):
        ids = inputs["input_ids"][rows]
        cache, steps = None, []
        for column in range(ids.shape[1]):
            step = model(input_ids=ids[:, column : column + 1], past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            steps.append(step.logits)
        assert (torch.cat(steps, dim=1) - logits[rows]).abs().max() <= 1e-12
    export(str(tmp_path / "ours"), str(tmp_path / "back"), "adapterhub", model=str(tmp_path / "base"))
    back = load_file(tmp_path / "back" / "adapter.safetensors")
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    flat = name.replace(" of an mlp", "")
    assert {n.replace(".default.", ".a.") for n in back} == set(SAVED[flat]["names"])
    assert config["config"] == SAVED[flat]["config"]["config"]
    if flat == name:
        assert all(torch.equal(back[n.replace(".a.", ".default.")], tensor) for n, tensor in tensors.items())


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"use_gating": True}, "use_gating=True, which prefix tuning here does not have"),
        ({"leave_out": [1]}, r"leave_out=\[1\], which prefix tuning here does not have: a prefix is in every layer"),
        ({"prefix_length": 4}, r"4 tokens in this LlamaForCausalLM make 4 · 32 values. It is damaged"),
        ({"flat": True}, "holds 'model.layers.0.*for which there is no place in a prefix"),
        ({"non_linearity": "gelu_new"}, "non_linearity='gelu_new'; relu"),
        ({"flat": "no"}, "flat='no'; bool was expected"),
    ],
)
def test_a_prefix_that_is_not_here_is_refused(said: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_prefix("llama/prefix of an mlp", tmp_path, **said)
    with pytest.raises(PEFTError, match=message):
        convert(tmp_path)


def test_a_prefix_with_two_values_is_damaged(tmp_path: Path) -> None:
    tensors = write_prefix("gpt2/prefix", tmp_path)
    first = next(iter(tensors))
    torch.save({**tensors, first: tensors[first] + 1}, tmp_path / "adapter" / "pytorch_adapter.bin")
    with pytest.raises(PEFTError, match="with two values"):
        convert(tmp_path)


def test_a_prefix_behind_which_the_text_stands_is_not_written(tmp_path: Path) -> None:
    base("llama").float().save_pretrained(tmp_path / "base")
    model = base("llama").float()
    inject(model, PrefixTuning(num_virtual_tokens=3))
    save_adapter(model, tmp_path / "ours")
    with pytest.raises(PEFTError, match=r"PrefixTuning\(keep_positions=True\) are written"):
        export(str(tmp_path / "ours"), str(tmp_path / "back"), "adapterhub", model=str(tmp_path / "base"))
