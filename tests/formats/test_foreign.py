"""Adapters of mlx-lm and LitGPT beside their own equations."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import build, outputs
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_peft import PEFTError, load_adapter
from lightning_peft.cli import main

GENERATOR = torch.Generator().manual_seed(3)
LAYERS = ("self_attn.q_proj", "mlp.down_proj")


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR) * 0.2


def layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if name.endswith(LAYERS)}  # type: ignore[misc]


def mlx(model: nn.Module, path: Path, dora: bool = False, **said: Any) -> None:
    """Write an adapter as mlx-lm does, and change the model's weights as its equations say."""
    tensors: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, layer in layers(model).items():
            a, b = drawn(layer.in_features, 3), drawn(3, layer.out_features)
            tensors |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
            layer.weight += 2.5 * (a @ b).T
            if dora:
                m = layer.weight.norm(dim=1) * (1 + drawn(layer.out_features))
                layer.weight *= (m / layer.weight.norm(dim=1))[:, None]
                tensors[f"{name}.m"] = m
    config = {"fine_tune_type": "dora" if dora else "lora", "num_layers": 2, "model": "somewhere/on-a-mac"}
    parameters = {"rank": 3, "scale": 2.5, "dropout": 0.1, "keys": [*LAYERS]}
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({**config, "lora_parameters": parameters, **said}))
    save_file(tensors, path / "adapters.safetensors")


def litgpt(model: nn.Module, path: Path, parts: str = "qv") -> None:
    """The same as LitGPT: query, key and value are one layer there."""
    tensors, flags = {}, {"lora_query": "q", "lora_key": "k", "lora_value": "v"}
    with torch.no_grad():
        for index in range(2):
            block, lead = model.get_submodule(f"model.layers.{index}"), f"transformer.h.{index}"
            fused = [block.get_submodule(f"self_attn.{part}_proj") for part in parts]
            others = [block.get_submodule(name) for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")]
            named = {
                "attn.qkv": fused,
                **{f"mlp.{n}": [m] for n, m in zip(("fc_1", "fc_2", "proj"), others, strict=True)},
            }
            for name, modules in named.items():
                pairs = [(drawn(2, module.in_features), drawn(module.out_features, 2)) for module in modules]
                for module, (a, b) in zip(modules, pairs, strict=True):
                    module.weight += 6 / 2 * b @ a
                tensors[f"{lead}.{name}.lora_A"] = torch.cat([a for a, _ in pairs])
                tensors[f"{lead}.{name}.lora_B"] = torch.cat([b for _, b in pairs])
        a, b = drawn(2, model.lm_head.in_features), drawn(64, 2)  # the vocabulary of 50 is filled up
        model.lm_head.weight += 6 / 2 * b[:50] @ a
        tensors |= {"lm_head.lora_A": a, "lm_head.lora_B": b}
    path.mkdir()
    torch.save({"model": tensors}, path / "lit_model.pth.lora")
    said = {"lora_r": 2, "lora_alpha": 6, "lora_dropout": 0.05, **{k: part in parts for k, part in flags.items()}}
    (path / "hyperparameters.yaml").write_text(
        "precision: bf16-true\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in said.items())
    )


WRITERS: dict[str, Callable[[nn.Module, Path], None]] = {
    "mlx": mlx,
    "mlx dora": lambda model, path: mlx(model, path, dora=True),
    "litgpt": litgpt,
    "litgpt of all three": lambda model, path: litgpt(model, path, "qkv"),
}


def converted(source: Path, tmp_path: Path, *options: str) -> Path:
    build("llama")[0].save_pretrained(tmp_path / "base")
    with pytest.raises(SystemExit) as stop:
        main(["convert", str(source), "--model", str(tmp_path / "base"), "--out", str(tmp_path / "lora"), *options])
    assert stop.value.code in (0, None), stop.value.code
    return tmp_path / "lora"


@pytest.mark.parametrize("tool", WRITERS)
def test_what_it_is_in_the_tools_own_equations(tool: str, tmp_path: Path) -> None:
    model, inputs = build("llama")
    before = outputs(model, inputs)
    WRITERS[tool](model, tmp_path / "theirs")
    expected = outputs(model, inputs)
    assert (expected - before).abs().max() > 1e-2
    out = converted(tmp_path / "theirs", tmp_path)
    loaded, _ = build("llama")
    load_adapter(loaded, out)
    assert (outputs(loaded, inputs) - expected).abs().max() <= 2e-5
    judge = peft.PeftModel.from_pretrained(build("llama")[0], out).eval()
    assert (outputs(judge, inputs) - expected).abs().max() <= 2e-5


def test_with_a_rank_it_is_the_nearest_lora(tmp_path: Path) -> None:
    model, inputs = build("llama")
    mlx(model, tmp_path / "theirs", dora=True)
    out = converted(tmp_path / "theirs", tmp_path, "--rank", "32")
    assert not json.loads((out / "adapter_config.json").read_text())["use_dora"]
    loaded, _ = build("llama")
    load_adapter(loaded, out)
    assert (outputs(loaded, inputs) - outputs(model, inputs)).abs().max() <= 1e-4


LEAD = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("tensors", "said", "message"),
    [
        ({f"{LEAD}.lora_a": (32, 3), f"{LEAD}.lora_b": (3, 32)}, {"fine_tune_type": "full"}, "fine_tune_type='full'"),
        ({f"{LEAD}.lora_a": (32, 3), f"{LEAD}.lora_b": (3, 32)}, {"lora_parameters": {"rank": 3}}, "has no 'scale'"),
        ({f"{LEAD}.lora_a": (32, 3)}, {}, r"q_proj' lacks one of lora_a, lora_b"),
        ({f"{LEAD}.lora_a": (4, 32, 3)}, {}, r"shape \[4, 32, 3\], which is none of a LoRA of a linear layer"),
        ({"layer.lora_a": (32, 3), "layer.lora_b": (3, 32)}, {}, r"adapts 'layer', which this .* does not have"),
        ({"model.embed_tokens.lora_a": (50, 3), "model.embed_tokens.lora_b": (3, 32)}, {}, "has a Embedding for"),
    ],
)
def test_what_mlx_has_else_is_refused(
    tensors: dict[str, tuple[int, ...]], said: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source, parameters = tmp_path / "theirs", {"rank": 3, "scale": 1.0}
    source.mkdir()
    config = {"fine_tune_type": "lora", "lora_parameters": parameters, **said}
    (source / "adapter_config.json").write_text(json.dumps(config))
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, source / "adapters.safetensors")
    build("llama")[0].save_pretrained(tmp_path / "base")
    with pytest.raises(SystemExit, match=message):
        main(["convert", str(source), "--model", str(tmp_path / "base"), "--out", str(tmp_path / "lora")])
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"transformer.h.0.mlp.fc.lora_A": (2, 32), "transformer.h.0.mlp.fc.lora_B": (64, 2)},
            "models like Llama alone",
        ),
        (
            {"transformer.h.0.attn.qkv.lora_A": (4, 32), "transformer.h.0.attn.qkv.lora_B": (7, 2)},
            "others were expected",
        ),
        ({"transformer.h.0.attn.qkv.lora_A": (4, 32)}, "lacks transformer.h.0.attn.qkv.lora_B"),
        ({"transformer.wte.weight": (50, 32)}, "'transformer.wte.weight', which is no part of a LoRA"),
    ],
)
def test_what_litgpt_has_else_is_refused(change: dict[str, tuple[int, ...]], message: str, tmp_path: Path) -> None:
    source = tmp_path / "theirs"
    source.mkdir()
    torch.save({"model": {k: torch.zeros(v) for k, v in change.items()}}, source / "lit_model.pth.lora")
    build("llama")[0].save_pretrained(tmp_path / "base")
    command = ["convert", str(source), "--model", str(tmp_path / "base"), "--out", str(tmp_path / "lora")]
    with pytest.raises(SystemExit, match=r"hyperparameters.yaml is not there"):
        main(command)
    (source / "hyperparameters.yaml").write_text("lora_r: 2\nlora_alpha: 6\nlora_query: true\n")
    with pytest.raises(SystemExit, match=message):
        main(command)


def test_the_base_has_to_be_named(tmp_path: Path) -> None:
    mlx(build("llama")[0], tmp_path / "theirs")
    with pytest.raises(SystemExit, match="name the base with --model"):
        main(["convert", str(tmp_path / "theirs"), "--out", str(tmp_path / "lora")])
    with pytest.raises(PEFTError, match=r"format of MLX.*lightning-peft convert DIR --model BASE"):
        load_adapter(build("llama")[0], tmp_path / "theirs")
