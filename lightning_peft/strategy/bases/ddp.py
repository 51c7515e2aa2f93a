"""DDP: the whole model on every process. What it waits for in a backward pass is decided when it wraps the model."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_peft.core.registry import several_adapters
from lightning_peft.core.view import ModelView
from lightning_peft.strategy.lifecycle import Lifecycle


class OnDDP(Lifecycle, DDPStrategy):
    """What ``PEFTStrategy`` does differently on ``DDPStrategy``."""

    def _replicated(self) -> list[tuple[list[nn.Parameter], Any]]:
        return [([p for p in self._module.parameters() if p.requires_grad], None)]

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        """Wrap the model; with several adapters, DDP is to look which of them took part in a step."""
        given = self._ddp_kwargs
        if several_adapters(ModelView(model)):
            self._ddp_kwargs = {"find_unused_parameters": True, **given}
        try:
            return super()._setup_model(model)
        finally:
            self._ddp_kwargs = given
