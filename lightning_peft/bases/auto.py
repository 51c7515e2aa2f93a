"""``base="auto"``: the strategy that Lightning's own ``"auto"`` would take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.fabric.utilities.imports import _IS_INTERACTIVE
from lightning.pytorch.accelerators import Accelerator, XLAAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy

from lightning_peft.bases import strategy_from_name
from lightning_peft.errors import PEFTError


def choose_strategy(
    accelerator: Accelerator | None, devices: Sequence[torch.device] | None, num_nodes: int
) -> Strategy:
    """Return a new strategy by the rules of Lightning's accelerator connector.

    Raises:
        PEFTError: The accelerator is a TPU.
    """
    if isinstance(accelerator, XLAAccelerator):
        raise PEFTError("base='auto' does not serve TPUs. Pass a configured strategy as base.")
    devices = list(devices or [torch.device("cpu")])
    if num_nodes > 1:
        return strategy_from_name("ddp")
    if len(devices) == 1:
        return SingleDeviceStrategy(device=devices[0])
    return strategy_from_name("ddp_fork" if _IS_INTERACTIVE else "ddp")
