"""The optimizer of the ready tasks: AdamW, a linear warm-up, then a linear decay to zero."""

from __future__ import annotations

import math

from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

_FUSED = ("cpu", "cuda", "mps", "xpu")


def adamw_with_linear_decay(
    module: LightningModule, lr: float, weight_decay: float, warmup_steps: int
) -> OptimizerLRSchedulerConfig:
    """Make what `configure_optimizers` returns.

    All parameters are handed over: which of them are trained is for the strategy to say. They are stepped by one kernel
    for all (`fused`) where torch has one and Lightning lets it: adapters are hundreds of small
    tensors, of which Python takes four times as long.

    Args:
        module: The module whose parameters are trained; its trainer says how many steps there will be.
        lr: The learning rate at the end of the warm-up.
        weight_decay: AdamW's.
        warmup_steps: Steps over which the learning rate rises from zero.
    """
    fused = True if _may_be_fused(module) else None
    optimizer = AdamW(module.parameters(), lr=lr, weight_decay=weight_decay, fused=fused)
    total = module.trainer.estimated_stepping_batches

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        if math.isinf(total):  # training without an end has nothing to decay towards
            return 1.0
        return max(0.0, (total - step) / max(1, total - warmup_steps))

    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}


def _may_be_fused(module: LightningModule) -> bool:
    """Whether torch has a fused AdamW for the device of `module`, and Lightning steps one.

    Under mixed precision it clips no gradients for one, since it may be one that takes off the loss's scale itself.
    """
    trainer = module.trainer
    if trainer.strategy.root_device.type not in _FUSED:
        return False
    if not isinstance(plugin := trainer.precision_plugin, MixedPrecision):
        return True
    clips = trainer.gradient_clip_val or is_overridden("configure_gradient_clipping", module)
    return plugin.scaler is None and not clips
