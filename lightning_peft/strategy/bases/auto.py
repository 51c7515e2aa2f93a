"""``base="auto"`` and ``"single_device"``: strategies that can be made when the Trainer has chosen its devices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch.accelerators import Accelerator, XLAAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from lightning.pytorch.trainer.connectors import accelerator_connector

from lightning_peft.errors import PEFTError
from lightning_peft.strategy.bases.names import strategy_from_name

AUTO = "auto"
SINGLE_DEVICE = SingleDeviceStrategy.strategy_name


def choose_strategy(
    base: str, accelerator: Accelerator | None, devices: Sequence[torch.device] | None, num_nodes: int
) -> Strategy:
    """Return a new strategy: for ``"auto"`` the one that Lightning's accelerator connector would take.

    Raises:
        PEFTError: The accelerator is a TPU, or ``"single_device"`` was asked for with several devices.
    """
    if isinstance(accelerator, XLAAccelerator):
        raise PEFTError(f"base={base!r} does not serve TPUs. Pass a configured strategy as base.")
    devices = list(devices or [torch.device("cpu")])
    if base == SINGLE_DEVICE and (num_nodes > 1 or len(devices) > 1):
        raise PEFTError(
            f"base='single_device' was given with {len(devices)} devices on {num_nodes} nodes. Set Trainer(devices=1, "
            "num_nodes=1), or take base='ddp'."
        )
    if num_nodes > 1:
        return strategy_from_name("ddp")
    if len(devices) == 1:
        return SingleDeviceStrategy(device=devices[0])
    return strategy_from_name("ddp_fork" if accelerator_connector._IS_INTERACTIVE else "ddp")
