"""Lightning checkpoints of modules that called HF PEFT by hand: HF PEFT's model says what they are."""

from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
from families import build, outputs, randomise

from lightning_peft import LoRA, PEFTStrategy, load_adapter
from lightning_peft.cli import main


class ByHand(L.LightningModule):
    """What a Lightning user writes without this package."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"], **options)
        self.model = peft.get_peft_model(build("llama")[0], config)
        randomise(self.model)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2)


def trained(path: Path, strategy: Any = "auto", **options: Any) -> ByHand:
    module = ByHand(**options)
    trainer = L.Trainer(
        strategy=strategy, accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(torch.randint(3, 50, (4, 7)), batch_size=2))
    trainer.save_checkpoint(path)
    return module.eval()


def convert(tmp_path: Path, *options: str) -> None:
    build("llama")[0].save_pretrained(tmp_path / "base")
    given = ["--model", str(tmp_path / "base"), "--out", str(tmp_path / "lora"), *options]
    with pytest.raises(SystemExit) as stop:
        main(["convert", str(tmp_path / "old.ckpt"), *given])
    if stop.value.code:
        raise ValueError(stop.value.code)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_it_is_what_hf_peft_has_trained(options: dict[str, Any], tmp_path: Path) -> None:
    module = trained(tmp_path / "old.ckpt", **options)
    convert(tmp_path, "--alpha=6")
    loaded, inputs = build("llama")
    load_adapter(loaded, tmp_path / "lora")
    assert (outputs(loaded, inputs) - outputs(module.model, inputs)).abs().max() <= 1e-5


def test_a_file_that_holds_adapters_alone(tmp_path: Path) -> None:
    """As of a module whose `on_save_checkpoint` leaves the base out, and whose model has no wrapper."""
    module = trained(tmp_path / "old.ckpt")
    content = torch.load(tmp_path / "old.ckpt", weights_only=True)
    content["state_dict"] = {
        name.replace("base_model.model.", "").replace(".default", ""): tensor
        for name, tensor in content["state_dict"].items()
        if "lora_" in name
    }
    torch.save(content, tmp_path / "old.ckpt")
    convert(tmp_path, "--alpha=6")
    loaded, inputs = build("llama")
    load_adapter(loaded, tmp_path / "lora")
    assert (outputs(loaded, inputs) - outputs(module.model, inputs)).abs().max() <= 1e-5


def test_what_is_not_known_is_asked_for(tmp_path: Path) -> None:
    trained(tmp_path / "old.ckpt")
    with pytest.raises(ValueError, match=r"lora_alpha, which stands in no tensor: give it by --alpha"):
        convert(tmp_path)
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"modules_to_save": ["lm_head"]}, "lm_head.modules_to_save.*trained whole"),
        ({"rank_pattern": {"q_proj": 3}}, r"has ranks \[2, 3\]"),
        ({"lora_bias": True}, r"lora_B.default.bias.*more than the A and B"),
        ({"trainable_token_indices": [3]}, r"embed_tokens.token_adapter.*more than the A and B"),
    ],
)
def test_what_a_lora_file_has_no_place_for(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    trained(tmp_path / "old.ckpt", **options)
    with pytest.raises(ValueError, match=said):
        convert(tmp_path, "--alpha=6")


def test_other_files(tmp_path: Path) -> None:
    trained(tmp_path / "old.ckpt")
    content = torch.load(tmp_path / "old.ckpt", weights_only=True)
    state = content["state_dict"]

    def refused(change: Any, said: str) -> None:
        torch.save({**content, "state_dict": change(dict(state))}, tmp_path / "old.ckpt")
        with pytest.raises(ValueError, match=said):
            convert(tmp_path, "--alpha=6")

    refused(lambda s: {k: v + 1 if "q_proj.base_layer" in k else v for k, v in s.items()}, "belongs to another base")
    refused(lambda s: {k: v for k, v in s.items() if "lora_" not in k}, "no tensors of HF PEFT's LoRA")
    refused(lambda s: {k: v for k, v in s.items() if "0.self_attn.q_proj.lora_B" not in k}, "no A and B of .*q_proj")
    refused(lambda s: s | {k.replace("default", "other"): v for k, v in s.items()}, "several adapters: default, other")
    refused(lambda s: {k.replace("layers.1", "layers.9"): v for k, v in s.items()}, "does not have under any ending")


def test_what_was_trained_beside_the_adapter(tmp_path: Path) -> None:
    module = trained(tmp_path / "old.ckpt")
    module.get_parameter("model.base_model.model.model.norm.weight").data += 1e-4
    content = torch.load(tmp_path / "old.ckpt", weights_only=True)
    torch.save({**content, "state_dict": module.state_dict()}, tmp_path / "old.ckpt")
    with pytest.raises(ValueError, match=r"model.norm.weight.*other values than the base"):
        convert(tmp_path, "--alpha=6")
    torch.save({**content, "state_dict": content["state_dict"] | {"own.weight": torch.ones(2)}}, tmp_path / "old.ckpt")
    with pytest.warns(UserWarning, match=r"own.weight, which is no part of the base"):
        convert(tmp_path, "--alpha=6")


def test_our_own_checkpoint_is_not_taken_for_one(tmp_path: Path) -> None:
    class Plain(ByHand):
        def __init__(self) -> None:
            L.LightningModule.__init__(self)
            self.model = build("llama")[0]

    trainer = L.Trainer(
        strategy=PEFTStrategy(LoRA(r=2)), accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Plain(), torch.utils.data.DataLoader(torch.randint(3, 50, (4, 7)), batch_size=2))
    trainer.save_checkpoint(tmp_path / "old.ckpt")
    with pytest.raises(ValueError, match="PEFTStrategy wrote"):
        convert(tmp_path, "--alpha=6")
