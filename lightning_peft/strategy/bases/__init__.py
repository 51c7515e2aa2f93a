"""What differs by base strategy, one file for each.

Imports tensors, core, operations, files, formats, storage, strategy and strategy.optimizers.
"""

from __future__ import annotations

from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
)

from lightning_peft.strategy.bases.ddp import OnDDP
from lightning_peft.strategy.bases.deepspeed import OnDeepSpeed
from lightning_peft.strategy.bases.fsdp import OnFSDP
from lightning_peft.strategy.bases.model_parallel import OnModelParallel

_BEHAVIOURS: dict[type[Strategy], type] = {
    FSDPStrategy: OnFSDP,
    ModelParallelStrategy: OnModelParallel,
    DeepSpeedStrategy: OnDeepSpeed,
    # Last: Lightning's DeepSpeedStrategy is one of these.
    DDPStrategy: OnDDP,
}


def behaviour(base: type[Strategy]) -> tuple[type, ...]:
    """Return what stands above ``PEFTStrategy`` on strategies of class ``base``: one class, or none."""
    return tuple(behaviour for kind, behaviour in _BEHAVIOURS.items() if issubclass(base, kind))[:1]
