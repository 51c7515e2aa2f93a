"""LoRA of kohya's scripts and diffusers beside the equation W + alpha / r · B A, on a text encoder and convolutions."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_peft import PEFTError, load_adapter
from lightning_peft.cli.tools.convert import convert
from lightning_peft.core.view import ModelView
from lightning_peft.formats.foreign.image_models import read_diffusers, read_kohya
from lightning_peft.formats.foreign.reading import tool_of, write_directory

SMALL = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.tensor([[1, 4, 5, 10]])
GENERATOR = torch.Generator().manual_seed(5)


def encoder() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(**SMALL, vocab_size=11, max_position_embeddings=8, eos_token_id=10)
    return transformers.CLIPTextModel(config).eval()


class Net(nn.Module):
    """A part of a UNet, with names that diffusers gives modules."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.down_blocks = nn.ModuleList([nn.ModuleDict({"conv1": nn.Conv2d(3, 6, 3, padding=1)})])
        self.mid_block = nn.ModuleDict({"to_out": nn.ModuleList([nn.Linear(6, 5)])})

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.down_blocks[0]["conv1"](x).flatten(2).mT  # type: ignore[index]
        out: Tensor = self.mid_block["to_out"][0](hidden)  # type: ignore[index]
        return out


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR) * 0.3


def change(model: nn.Module, ending: tuple[str, ...]) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Change weights as the equation says, and return A, B and alpha by the module's name."""
    made = {}
    for index, (name, module) in enumerate(model.named_modules()):
        if not name.endswith(ending):
            continue
        assert isinstance(module, nn.Linear | nn.Conv2d)
        out, *rest = module.weight.shape
        r, alpha = 2 + index % 2, 1.0 + index % 3
        a, b = drawn(r, *rest), drawn(out, r, *([1] * (len(rest) - 1)))
        with torch.no_grad():
            delta = b.double().flatten(1) @ a.double().flatten(1)
            module.weight += (alpha / r * delta).view_as(module.weight).float()
        made[name] = a, b, alpha
    return made


def kohya(made: Any, lead: str) -> dict[str, Tensor]:
    tensors = {}
    for name, (a, b, alpha) in made.items():
        key = lead + name.replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": torch.tensor(alpha)}
    return tensors


def diffusers(made: Any, lead: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {f"{lead}.{n}.lora_{k}.weight": t for n, (a, b, _) in made.items() for k, t in (("A", a), ("B", b))}
    # A module's name is another one's ending nowhere here.
    said = {"r": 2, "lora_alpha": 1.0, "alpha_pattern": {name: alpha for name, (_, _, alpha) in made.items()}}
    return tensors, {f"{lead}.{key}": value for key, value in said.items()}


@pytest.mark.parametrize("tool", ["kohya", "diffusers", "kohya, as transformers 4 names them"])
def test_a_text_encoder_by_the_command(tool: str, tmp_path: Path, recwarn: Any) -> None:
    encoder().save_pretrained(tmp_path / "text_encoder")
    judge = encoder()
    made = change(judge, ("q_proj", "fc1"))
    other = {"lora_unet_conv_in.lora_down.weight": drawn(2, 3), "lora_unet_conv_in.lora_up.weight": drawn(4, 2)}
    (tmp_path / "lora").mkdir()
    if tool == "diffusers":
        tensors, said = diffusers(made, "text_encoder")
        tensors |= {"unet.conv_in.lora_A.weight": drawn(2, 3), "unet.conv_in.lora_B.weight": drawn(4, 2)}
        file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
        save_file(tensors, file, {"format": "pt", "lora_adapter_metadata": json.dumps(said)})
    else:
        lead = "lora_te_text_model_" if "4" in tool else "lora_te_"
        save_file({**kohya(made, lead), **other}, tmp_path / "lora" / "mine.safetensors")
    convert(str(tmp_path / "lora"), str(tmp_path / "text_encoder"), str(tmp_path / "out"))
    assert any("is also for unet, which are models of their own" in str(warning.message) for warning in recwarn)
    model = encoder()
    load_adapter(model, tmp_path / "out")
    got, expected = model(IDS).last_hidden_state, judge(IDS).last_hidden_state
    assert (got - expected).abs().max() <= 1e-5
    assert (expected - encoder()(IDS).last_hidden_state).abs().max() > 0.01


def test_layers_and_convolutions_of_a_unet(tmp_path: Path) -> None:
    judge, model, x = Net(), Net(), drawn(2, 3, 4, 4)
    file = tmp_path / "mine.safetensors"
    save_file(kohya(change(judge, ("conv1", "to_out.0")), "lora_unet_"), file)
    tool = tool_of(file)
    assert tool == "kohya's scripts"
    (tmp_path / "hf").mkdir()
    write_directory(tool, file, ModelView(model), tmp_path / "hf", None)
    load_adapter(model, tmp_path / "hf")
    assert (model(x) - judge(x)).abs().max() <= 1e-5 < (judge(x) - Net()(x)).abs().max()


def test_a_name_that_could_be_two(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a_b": nn.ModuleList([nn.Linear(4, 4)]), "a": nn.ModuleDict({"b_0": nn.Linear(4, 4)})})
    key = "lora_unet_a_b_0"
    tensors = {f"{key}.lora_down.weight": drawn(2, 4), f"{key}.lora_up.weight": drawn(4, 2)}
    save_file(tensors, tmp_path / "mine.safetensors")
    with pytest.raises(PEFTError, match=r"'a_b_0', which could be 'a_b.0', 'a.b_0' of this ModuleDict"):
        read_kohya(tmp_path / "mine.safetensors", ModelView(model))


DAMAGED: dict[str, tuple[dict[str, Tensor], str]] = {
    "no up": ({"lora_unet_x.lora_down.weight": torch.ones(2, 4)}, "has no A and B of 'lora_unet_x'"),
    "dora": ({"lora_unet_x.dora_scale": torch.ones(4)}, "'lora_unet_x.dora_scale', which is none of a plain LoRA"),
    "lycoris": ({"lora_unet_x.hada_w1_a": torch.ones(4)}, "'lora_unet_x.hada_w1_a', which is none of a plain LoRA"),
    "other names": (
        {"lora_unet_y.lora_down.weight": torch.ones(2, 4), "lora_unet_y.lora_up.weight": torch.ones(4, 2)},
        "'y', which is none in this Net",
    ),
    "sgm": (
        {f"lora_unet_input_blocks_1_x.lora_{d}.weight": torch.ones(2, 2) for d in ("down", "up")},
        r"Stable Diffusion's own UNet: load the file in diffusers",
    ),
    "another part": (
        {f"lora_te_x.lora_{d}.weight": torch.ones(2, 2) for d in ("down", "up")},
        "is for text_encoder, and none of it for this Net",
    ),
    "a kind of alpha": (
        kohya({"down_blocks.0.conv1": (torch.ones(2, 3, 3, 3), torch.ones(6, 2, 1, 1), [1.0, 2.0])}, "lora_unet_"),
        r"alpha of 'down_blocks.0.conv1' has the shape \[2\]",
    ),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_what_is_damaged_or_no_plain_lora(what: str, tmp_path: Path) -> None:
    tensors, message = DAMAGED[what]
    save_file(tensors, tmp_path / "mine.safetensors")
    with pytest.raises(PEFTError, match=message):
        read_kohya(tmp_path, ModelView(Net()))


def test_a_damaged_header_of_diffusers(tmp_path: Path) -> None:
    tensors = {"unet.x.lora_A.weight": torch.ones(2, 4), "unet.x.lora_B.weight": torch.ones(4, 2)}
    save_file(tensors, tmp_path / "mine.safetensors", {"lora_adapter_metadata": "{"})
    with pytest.raises(PEFTError, match="has a damaged header"):
        read_diffusers(tmp_path, ModelView(Net()))
    save_file(tensors, tmp_path / "mine.safetensors", {"lora_adapter_metadata": '{"unet.use_rslora": true}'})
    with pytest.raises(PEFTError, match="says use_rslora"):
        read_diffusers(tmp_path, ModelView(Net()))
