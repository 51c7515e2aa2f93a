"""The optimizer of the ready tasks: one kernel for all adapters wherever torch and Lightning have it."""

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from lightning_peft import LoRA, PEFTStrategy
from lightning_peft.tasks.schedule import adamw_with_linear_decay


class Regression(L.LightningModule):
    """A module with the optimizer of the ready tasks."""

    def __init__(self, fused: bool | None = None) -> None:
        super().__init__()
        self.fused = fused
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return (self.down(self.up(batch).relu()) - batch).square().mean()

    def configure_optimizers(self) -> Any:
        made = adamw_with_linear_decay(self, lr=0.01, weight_decay=0.1, warmup_steps=1)
        if self.fused is not None:
            made["optimizer"].param_groups[0]["fused"] = self.fused
        return made


class Clipping(Regression):
    """One that clips its gradients itself."""

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")


class Packed(Regression):
    """One with codes of a quantiser among its parameters."""

    def __init__(self) -> None:
        super().__init__()
        # It has no kernel, and is never stepped.
        self.codes = nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False)


def fit(module: Regression, **options: Any) -> Regression:
    trainer = L.Trainer(
        strategy=PEFTStrategy(LoRA(r=2, target_modules=["up", "down"]), merge_on_train_end=False),
        accelerator="cpu",
        devices=1,
        max_steps=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        **options,
    )
    trainer.fit(module, DataLoader(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)), batch_size=2))
    return module


def is_fused(module: Regression) -> bool:
    optimizer = module.optimizers(use_pl_optimizer=False)
    return all(group["fused"] for group in optimizer.param_groups)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("kind", "options", "fused"),
    [
        (Regression, {}, True),
        (Regression, {"gradient_clip_val": 0.5}, True),
        (Regression, {"precision": "bf16-true"}, True),
        (Regression, {"precision": "bf16-mixed"}, True),
        (Regression, {"precision": "bf16-mixed", "gradient_clip_val": 0.5}, False),
        (Clipping, {"precision": "bf16-mixed"}, False),
        (Clipping, {}, True),
        (Packed, {}, True),
    ],
)
def test_one_kernel_steps_all_adapters_where_there_is_one(
    kind: type[Regression], options: dict[str, Any], fused: bool
) -> None:
    module = fit(kind(), **options)
    assert is_fused(module) == fused
    before = Regression().up.weight
    assert torch.equal(module.up.weight.float(), before.to(module.up.weight.dtype).float())
    assert any(p.any() for name, p in module.named_parameters() if name.endswith("lora_B"))


def test_lightning_would_not_clip_for_a_fused_one() -> None:
    """What the rule is made for: with it the run above clips."""

    class Fused(Regression):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), fused=True)

    with pytest.raises((MisconfigurationException, RuntimeError), match="does not allow for gradient clipping"):
        fit(Fused(), precision="bf16-mixed", gradient_clip_val=0.5)


def test_the_kernel_steps_as_the_plain_optimizer_does() -> None:
    fused, plain = (
        {name: p for name, p in fit(Regression(fused)).named_parameters() if p.requires_grad} for fused in (True, False)
    )
    assert fused.keys() == plain.keys()
    for name, parameter in fused.items():
        torch.testing.assert_close(parameter, plain[name], atol=1e-6, rtol=1e-5)
