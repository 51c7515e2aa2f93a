"""``verify``, ``diff`` and ``inspect --json``."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import build, randomise
from transformers import LlamaForCausalLM

from lightning_peft import LoRA, inject, save_adapter
from lightning_peft.cli import main


def ran(capsys: Any, *arguments: str) -> tuple[str, str]:
    """Return what a command prints, and its error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return capsys.readouterr().out, "" if stop.value.code == 0 else str(stop.value.code)


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    model = build("llama")[0]
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(build("llama")[0], config).save_pretrained(tmp_path / "peft")
    inject(model, LoRA(r=4, target_modules=["q_proj"]))
    randomise(model)
    save_adapter(model, tmp_path / "ours")
    return {path.name: str(path) for path in tmp_path.iterdir()}


def test_an_adapter_of_its_base(places: dict[str, str], capsys: Any) -> None:
    out, error = ran(capsys, "verify", places["ours"], f"--model={places['base']}")
    assert not error
    assert "2 modules (LoRAAdapter). The weights are those that it was trained on." in out
    out, error = ran(capsys, "verify", places["peft"], f"--model={places['base']}")
    assert "names and shapes alone were compared" in out


@pytest.mark.parametrize("adapter", ["ours", "peft"])
@pytest.mark.parametrize("width", [64, 256])
def test_another_size_of_base(adapter: str, width: int, places: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    config = build("llama")[0].config
    config.hidden_size = width
    assert width != build("llama")[0].config.hidden_size
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    _, error = ran(capsys, "verify", places[adapter], f"--model={tmp_path / 'other'}")
    assert "another base model" in error or "shape" in error


@pytest.mark.parametrize(
    ("layers", "words"), [(1, "that this LlamaForCausalLM does not have"), (3, "there are no tensors for it")]
)
def test_another_depth_of_base(layers: int, words: str, places: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    config = build("llama")[0].config
    config.num_hidden_layers = layers
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    _, error = ran(capsys, "verify", places["peft"], f"--model={tmp_path / 'other'}")
    assert words in error


def test_other_weights_and_a_file_that_was_changed(places: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    other = build("llama")[0]
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    other.save_pretrained(tmp_path / "other")
    _, error = ran(capsys, "verify", places["ours"], f"--model={tmp_path / 'other'}")
    assert "was written for another base model" in error
    with (Path(places["ours"]) / "adapter_config.json").open("a") as file:
        file.write(" ")
    _, error = ran(capsys, "verify", places["ours"], f"--model={places['base']}")
    assert "adapter_config.json" in error


def test_two_adapters(places: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    """A change is the same if its scale is in other places."""
    ran(capsys, "export", places["ours"], f"--out={tmp_path / 'copy'}", "--rank=16")
    out, error = ran(capsys, "diff", places["ours"], str(tmp_path / "copy"))
    assert not error
    assert "r: 4 -> 16" in out
    assert "2 changes of weights: they differ by 0.000% of their norm on average" in out
    out, _ = ran(capsys, "diff", places["ours"], places["peft"])
    assert "by 100.000% at most" in out  # of an adapter that has learnt nothing
    save = peft.get_peft_model(build("llama")[0], peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[]))
    save.save_pretrained(tmp_path / "ia3")
    out, _ = ran(capsys, "diff", places["ours"], str(tmp_path / "ia3"))
    assert "peft_type: 'LORA' -> 'IA3'" in out
    assert "in the first alone: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in out


def test_inspect_for_programs(places: dict[str, str], capsys: Any) -> None:
    out, error = ran(capsys, "inspect", places["ours"], "--json")
    assert not error
    content = json.loads(out)
    assert content["config"]["peft_type"] == "LORA"
    assert content["shapes"]["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"][0] == 4
    assert content["base"]["class"] == "LlamaForCausalLM"
