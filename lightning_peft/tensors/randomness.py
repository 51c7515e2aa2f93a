"""States of the random generators that a process draws from: torch's, on the CPU and a device, Python's, NumPy's."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy
import torch


def generator_states(device: torch.device) -> dict[str, Any]:
    """Return the states of the generators, in tensors and plain values.

    Args:
        device: Whose generator to look at beside the CPU's.
    """
    numpys = numpy.random.get_state(legacy=False)
    assert isinstance(numpys, dict)
    key = torch.from_numpy(numpys["state"]["key"].astype(numpy.int64))
    return {
        "python": random.getstate(),
        "numpy": {**numpys, "state": {**numpys["state"], "key": key}},
        "torch": torch.get_rng_state(),
        **({} if device.type == "cpu" else {device.type: torch.get_device_module(device).get_rng_state(device)}),
    }


def set_generator_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Put generators into ``states``, which :func:`generator_states` returned on a device of any kind."""
    random.setstate(states["python"])
    numpys = states["numpy"]
    key = numpys["state"]["key"].numpy().astype(numpy.uint32)
    numpy.random.set_state({**numpys, "state": {**numpys["state"], "key": key}})
    torch.set_rng_state(states["torch"])
    if device.type in states:
        torch.get_device_module(device).set_rng_state(states[device.type], device)
