"""Files of other tools, in the layouts that they document, are named with what to do."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_peft import PEFTError, load_adapter
from lightning_peft.cli import main

PAGE = (Path(__file__).resolve().parents[2] / "examples" / "docs" / "coming_from.md").read_text()
A, B = torch.zeros(4, 16), torch.zeros(16, 4)


def litgpt(path: Path) -> None:
    names = ("transformer.h.0.attn.qkv.lora_A", "transformer.h.0.attn.qkv.lora_B")
    torch.save({"model": dict(zip(names, (A, B), strict=True))}, path / "lit_model.pth.lora")
    (path / "hyperparameters.yaml").write_text("lora_r: 4\n")


def litgpt_adapter(path: Path) -> None:
    torch.save({"model": {"transformer.h.2.attn.gating_factor": A}}, path / "lit_model.pth.adapter_v2")


def mlx(path: Path) -> None:
    parameters = {"rank": 4, "scale": 20.0, "dropout": 0.0}
    config = {"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": parameters}
    (path / "adapter_config.json").write_text(json.dumps(config))
    lead = "model.layers.0.self_attn.q_proj.lora_"
    save_file({f"{lead}a": A.T.contiguous(), f"{lead}b": B.T.contiguous()}, path / "adapters.safetensors")


def adapterhub(path: Path) -> None:
    config = {"config": {"architecture": "lora"}, "model_class": "BertAdapterModel", "version": "adapters.1.3.0"}
    (path / "adapter_config.json").write_text(json.dumps(config))
    torch.save({"bert.encoder.layer.0.attention.self.query.loras.mine.lora_A": A}, path / "pytorch_adapter.bin")


def llm_adapters(path: Path) -> None:
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "BOTTLENECK", "bottleneck_size": 256}))
    torch.save({"base_model.model.layers.0.mlp.down_proj.adapter_down.weight": A}, path / "adapter_model.bin")


def nemo(path: Path) -> None:
    (path / "weights").mkdir()
    (path / "context").mkdir()


def torchtune(path: Path) -> None:
    torch.save({"layers.0.attn.q_proj.lora_a.weight": A}, path / "adapter_model.pt")


def kohya(path: Path) -> None:
    lead = "lora_unet_down_blocks_1_attentions_0_proj_in"
    tensors = {"lora_down.weight": A, "lora_up.weight": B, "alpha": torch.tensor(4.0)}
    save_file({f"{lead}.{name}": tensor for name, tensor in tensors.items()}, path / "it.safetensors")


def diffusers(path: Path) -> None:
    lead = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora"
    save_file({f"{lead}.down.weight": A, f"{lead}.up.weight": B}, path / "pytorch_lora_weights.safetensors")


TOOLS: dict[Callable[[Path], None], str] = {
    litgpt: r"LitGPT.*litgpt merge_lora",
    litgpt_adapter: r"LitGPT's adapters.*LitGPT alone reads it",
    mlx: r"MLX.*mlx_lm\.fuse",
    adapterhub: r"AdapterHub's package adapters.*merge_adapter",
    llm_adapters: r"LLM-Adapters.*SeriesAdapter",
    nemo: r"NeMo.*export_lora",
    torchtune: r"torchtune.*name that directory",
    kohya: r"kohya's scripts.*load_lora_weights",
    diffusers: r"diffusers.*load_lora_weights",
}


@pytest.mark.parametrize("write", TOOLS, ids=lambda write: write.__name__)
def test_it_is_known_by_sight(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(PEFTError, match=TOOLS[write]):
        load_adapter(nn.Sequential(nn.Linear(16, 16)), tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(tmp_path)])
    (name,) = re.findall("is in the format of (.*?), which", str(stop.value.code))
    assert name in PAGE


def test_one_file(tmp_path: Path) -> None:
    kohya(tmp_path)
    with pytest.raises(PEFTError, match="kohya"):
        load_adapter(nn.Sequential(nn.Linear(16, 16)), tmp_path / "it.safetensors")


def test_others_are_as_before(tmp_path: Path) -> None:
    with pytest.raises(PEFTError, match="does not exist"):
        load_adapter(nn.Sequential(nn.Linear(16, 16)), tmp_path / "nowhere")
    # NeMo's directories have both.
    for folder in (tmp_path, tmp_path / "a" / "weights", tmp_path / "b" / "context"):
        folder.mkdir(parents=True, exist_ok=True)
    for directory in (tmp_path, tmp_path / "a", tmp_path / "b"):
        with pytest.raises(PEFTError, match="does not exist"):
            load_adapter(nn.Sequential(nn.Linear(16, 16)), directory)
