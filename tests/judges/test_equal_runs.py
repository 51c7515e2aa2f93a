"""The same run here and with HF PEFT: of equal initial values, data, order and rates, losses are equal at each step."""

from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
from families import build
from torch import Tensor, nn

from lightning_peft import IA3, DoRA, LoRA, PEFTMethod, PEFTStrategy, PrefixTuning, PromptTuning, save_adapter

STEPS = 20
TARGETS = ["q_proj", "v_proj", "down_proj"]
METHODS: dict[str, tuple[PEFTMethod, float]] = {
    "lora": (LoRA(r=4, alpha=12, target_modules=TARGETS), 5e-3),
    "rslora": (LoRA(r=4, alpha=3, target_modules=TARGETS, use_rslora=True), 5e-3),
    "dora": (DoRA(r=4, alpha=12, target_modules=TARGETS), 5e-3),
    "ia3": (IA3(), 2e-2),
    "prefix": (PrefixTuning(num_virtual_tokens=4), 2e-2),
    "prompt": (PromptTuning(num_virtual_tokens=4), 2e-2),
}


def batches() -> list[dict[str, Tensor]]:
    """Texts of three words with padding on the left; learned is what stands behind their first token."""
    draw = torch.Generator().manual_seed(5)
    found = []
    for _ in range(STEPS):
        ids = torch.randint(3, 6, (4, 9), generator=draw)
        mask = torch.ones_like(ids)
        mask[1, :3] = mask[2, :5] = 0
        labels = ids.masked_fill(mask.cumsum(dim=1) < 2, -100)
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """In the model's own dtype: transformers' own loss is of float32. HF PEFT's logits are those of the prompt too."""
    labels = batch["labels"][:, 1:]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return nn.functional.cross_entropy(logits[:, -labels.shape[1] - 1 : -1].transpose(1, 2), labels)


class Ours(L.LightningModule):
    def __init__(self, rate: float, dtype: torch.dtype, folder: Path) -> None:
        super().__init__()
        self.model = build("llama")[0].to(dtype)
        self.rate, self.folder = rate, folder
        self.losses: list[float] = []

    def on_train_start(self) -> None:
        save_adapter(self, self.folder)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = loss_of(self.model, batch)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.rate, weight_decay=0.01)


def our_losses(method: PEFTMethod, rate: float, dtype: torch.dtype, folder: Path) -> list[float]:
    module = Ours(rate, dtype, folder)
    L.seed_everything(1, verbose=False)
    L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        strategy=PEFTStrategy(method, merge_on_train_end=False),
    ).fit(module, torch.utils.data.DataLoader(batches(), batch_size=None))
    return module.losses


def their_losses(method: PEFTMethod, rate: float, dtype: torch.dtype, folder: Path) -> list[float]:
    """HF PEFT with a plain loop, from the values that our run started with."""
    base = build("llama")[0].to(dtype)
    if isinstance(method, PrefixTuning | PromptTuning):
        model = _with_prompt(folder, base)
    else:
        model = peft.PeftModel.from_pretrained(base, folder, is_trainable=True, autocast_adapter_dtype=False)
    trained = [parameter for parameter in model.to(dtype).train().parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01)
    losses = []
    for batch in batches():
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _with_prompt(folder: Path, base: Any) -> Any:
    """HF PEFT trains no prompt that it loads; so it makes one, and is given our values."""
    loaded = peft.PeftModel.from_pretrained(base, folder)
    values = loaded.prompt_encoder["default"].embedding.weight.data.clone()
    config = peft.PeftConfig.from_pretrained(folder)
    config.inference_mode = False
    model: Any = peft.get_peft_model(build("llama")[0], config).to(base.dtype)
    model.prompt_encoder["default"].embedding.weight.data.copy_(values)
    return model


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", METHODS)
def test_losses_are_those_of_peft(name: str, dtype: torch.dtype, bound: float, tmp_path: Path) -> None:
    method, rate = METHODS[name]
    ours = our_losses(method, rate, dtype, tmp_path)
    theirs = their_losses(method, rate, dtype, tmp_path)
    assert ours[-1] < ours[0] - 0.05
    assert ours == pytest.approx(theirs, rel=bound)
