"""States of the random generators that a process draws from: torch's, on the CPU and a device, Python's, NumPy's."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy
import torch

from lightning_peft.errors import PEFTError


def generator_states(device: torch.device) -> dict[str, Any]:
    """Return the states of the generators, in tensors and plain values.

    Args:
        device: Whose generator to look at beside the CPU's.
    """
    numpys = numpy.random.get_state(legacy=False)
    assert isinstance(numpys, dict)
    key = torch.from_numpy(numpys["state"]["key"].astype(numpy.int64))
    states = {
        "python": random.getstate(),
        "numpy": {**numpys, "state": {**numpys["state"], "key": key}},
        "torch": torch.get_rng_state(),
    }
    if (module := _module_of(device)) is not None:
        states[device.type] = module.get_rng_state(*_which(device))
    return states


def set_generator_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Put generators into ``states``, which :func:`generator_states` returned on a device of any kind.

    Raises:
        PEFTError: They are no such states.
    """
    try:
        _set(states, device)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise PEFTError(
            f"The checkpoint's states of random generators are damaged: {error}. Take another checkpoint."
        ) from error


def _set(states: Mapping[str, Any], device: torch.device) -> None:
    random.setstate(states["python"])
    numpys = states["numpy"]
    key = numpys["state"]["key"].numpy().astype(numpy.uint32)
    numpy.random.set_state({**numpys, "state": {**numpys["state"], "key": key}})
    torch.set_rng_state(states["torch"])
    module = _module_of(device)
    if module is not None and device.type in states:
        module.set_rng_state(states[device.type], *_which(device))


def _module_of(device: torch.device) -> Any:
    """Return what torch has for this kind of device, if it has generators of its own."""
    module = None if device.type == "cpu" else getattr(torch, device.type, None)
    return module if hasattr(module, "get_rng_state") else None


def _which(device: torch.device) -> tuple[torch.device, ...]:
    """Return how a device is named to its module; of MPS there is one."""
    return () if device.type == "mps" else (device,)
