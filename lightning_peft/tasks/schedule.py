"""The optimizer of the ready tasks: AdamW, a linear warm-up, then a linear decay to zero."""

from __future__ import annotations

import math

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR


def adamw_with_linear_decay(
    module: LightningModule, lr: float, weight_decay: float, warmup_steps: int
) -> OptimizerLRSchedulerConfig:
    """Make what `configure_optimizers` returns.

    All parameters are handed over: which of them are trained is for the strategy to say.

    Args:
        module: The module whose parameters are trained; its trainer says how many steps there will be.
        lr: The learning rate at the end of the warm-up.
        weight_decay: AdamW's.
        warmup_steps: Steps over which the learning rate rises from zero.
    """
    optimizer = AdamW(module.parameters(), lr=lr, weight_decay=weight_decay)
    total = module.trainer.estimated_stepping_batches

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        if math.isinf(total):  # training without an end has nothing to decay towards
            return 1.0
        return max(0.0, (total - step) / max(1, total - warmup_steps))

    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}
