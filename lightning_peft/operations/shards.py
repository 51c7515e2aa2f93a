"""A model that is cut up over processes, while nothing runs: every parameter in its shards, or one module's whole.

After a forward pass without gradients, FSDP leaves its outermost unit gathered: what is then written to the parameters
is written to copies, and lost when the shards are gathered anew. So whatever reads or writes a model between steps
looks at it with :func:`resharded`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._runtime_utils import _reshard
from torch.distributed.tensor import DTensor

from lightning_peft.core.adapter import CHILD, clean_name
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.tensors import sharding
from lightning_peft.tensors.sharding import keep_shape, put_back

_UNIT = "_peft_fsdp_unit"
_GATHERED_BY_USER = "_ds_z3_gathered_param_context_depth"


def resharded(model: nn.Module) -> ModelView:
    """Put all parameters of ``model`` back into their shards, and look at it.

    Raises:
        PEFTError: Parameters are gathered by hand, for as long as a context lasts.
    """
    view = ModelView(model)
    put_back(module for _, module in view.walked)
    units = (module.__dict__.get(_UNIT) for _, module in view.walked)
    for unit in dict.fromkeys(unit for unit in units if unit is not None):
        # A training step runs within the forward pass of the outermost unit.
        if unit._handle is not None and unit.training_state.name == "IDLE":
            _reshard(unit, unit._handle, unit._handle.uses_sharded_strategy)
    every = (parameter for _, module in view.walked for parameter in module._parameters.values())
    # Names take longer than all else here, and are for the error alone.
    if any(hasattr(parameter, _GATHERED_BY_USER) for parameter in every):
        held = [name for name, parameter in view.parameters.items() if hasattr(parameter, _GATHERED_BY_USER)]
        raise PEFTError(
            f"{held[0]!r} is gathered by `with deepspeed.zero.GatheredParameters(…)`. Leave that context first: "
            "lightning_peft gathers what it needs itself, one module at a time."
        )
    return view


def keep_units(wrapped: FullyShardedDataParallel, shapes: Mapping[str, torch.Size]) -> None:
    """Keep what FSDP1 does not tell: with modules the unit that has their parameters, and with these their shapes.

    Args:
        wrapped: The outermost unit.
        shapes: Those of all parameters before, by name.
    """
    for name, parameter in wrapped.named_parameters():
        keep_shape(parameter, shapes[clean_name(name)])
    for unit in FullyShardedDataParallel.fsdp_modules(wrapped):  # the innermost last
        for module in unit.modules():
            module.__dict__[_UNIT] = unit


def knows_units(module: nn.Module) -> bool:
    """Whether a strategy has cut up ``module`` by FSDP1: see :func:`keep_units`."""
    return _UNIT in module.__dict__


def unit_of(module: nn.Module) -> FullyShardedDataParallel | None:
    """Return the unit of FSDP1 that has cut up the parameters of ``module``, if there is one."""
    unit: FullyShardedDataParallel | None = module.__dict__.get(_UNIT)
    return unit if unit is not None and unit._handle is not None and unit._handle.uses_sharded_strategy else None


def in_pieces(module: nn.Module) -> bool:
    """Whether the parameters of ``module`` itself are, between steps, in pieces on several processes."""
    own = module.parameters(recurse=False)
    return unit_of(module) is not None or any(isinstance(p, DTensor) or hasattr(p, "ds_tensor") for p in own)


@contextmanager
def gathered(*modules: nn.Module) -> Iterator[None]:
    """Within it the parameters of each of ``modules`` itself, and of its adapters, are whole, unless they are DTensors.

    Every process has to enter it. What is written to the parameters is kept.
    """
    slots = [slot for module in modules if (slot := module._modules.get(CHILD)) is not None]
    parameters = [parameter for module in modules for parameter in module.parameters(recurse=False)]
    with ExitStack() as stack:
        for unit in dict.fromkeys(unit for module in modules if (unit := unit_of(module)) is not None):
            stack.enter_context(FullyShardedDataParallel.summon_full_params(unit, recurse=False))
        stack.enter_context(sharding.gathered([*parameters, *(p for slot in slots for p in slot.parameters())]))
        yield
