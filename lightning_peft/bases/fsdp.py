"""FSDP1: the frozen model in shards, the adapters whole on every process.

FSDP1 flattens the parameters of a unit into one, of one dtype, whose gradient it allocates and reduces as a whole:
adapters inside would cost the gradient traffic of the entire model. So they are left out of its units.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._runtime_utils import _reshard

from lightning_peft.adapter import slots
from lightning_peft.base_weights import allocate, has_meta, materialise
from lightning_peft.bases.sharded import OnShards
from lightning_peft.errors import PEFTError
from lightning_peft.fingerprint import record_base
from lightning_peft.merge import is_merged, refuse_ties
from lightning_peft.registry import registries


class OnFSDP(OnShards):
    """What ``PEFTStrategy`` does differently on ``FSDPStrategy``."""

    kwargs: dict[str, Any]
    _state_dict_type: str
    _wrapped: FullyShardedDataParallel | None = None

    @property
    def _saves_shards(self) -> bool:
        return self._state_dict_type == "sharded"

    def setup_environment(self) -> None:
        """Set up processes; refuse CPUs as Lightning does, which asks for the exact class."""
        if self._base_class is FSDPStrategy and not isinstance(self.accelerator, CUDAAccelerator):
            raise PEFTError(
                f"base='fsdp' was given with accelerator {type(self.accelerator).__name__}; FSDP needs GPUs. Take "
                "base='ddp' or 'auto', or Trainer(accelerator='gpu')."
            )
        super().setup_environment()

    @property
    def _is_wrapped(self) -> bool:
        return self._wrapped is not None and self._wrapped.module is self._module

    def _place_adapters(self) -> None:
        if not self._is_wrapped:
            _refuse_wrapped(self._module)
            if self._merge_on_train_end:
                refuse_ties(self._module)
            record_base(self._module)
        for part in self._left_out():
            materialise(part, self.root_device)
            for parameter in part.parameters():
                dist.broadcast(parameter.detach(), src=0)
        # Lightning refuses to clip by norm, since under FSDP each process would see a part of it. Ours are whole.
        plugin = self.precision_plugin
        plugin.clip_grad_by_norm = Precision.clip_grad_by_norm.__get__(plugin)  # type: ignore[method-assign]

    def _left_out(self) -> list[nn.Module]:
        """Return what FSDP has no part in: adapters, and modules trained whole."""
        whole = [
            root.get_submodule(name) for _, root, registry in registries(self._module) for name in registry.train_also
        ]
        return [*(slot for _, _, slot in slots(self._module)), *whole]

    def _setup_model(self, model: nn.Module) -> nn.Module:
        """Wrap the module without what is trained. One that was wrapped before keeps its wrapper.

        Lightning drops the outermost wrapper after each run, although parameters stay flattened into it.
        """
        if self._is_wrapped:
            assert self._wrapped is not None
            return self._wrapped
        given = self.kwargs
        self.kwargs = _leaving_out(given, self._left_out())
        # FSDP knows nothing of modules that are left out when it materialises those inside a unit.
        self.kwargs["param_init_fn"] = partial(self._materialise, given.get("param_init_fn"))
        try:
            wrapped = super()._setup_model(model)
        finally:
            self.kwargs = given
        assert isinstance(wrapped, FullyShardedDataParallel)
        self._wrapped = wrapped
        wrapped.register_forward_hook(self._reshard_merged)
        with FullyShardedDataParallel.summon_full_params(wrapped, recurse=False):
            pass  # The first unit that is gathered takes itself for the outermost one.
        self._load_base_weights()
        return wrapped

    def _materialise(self, initialise: Callable[[nn.Module], None] | None, module: nn.Module) -> None:
        if initialise is not None and has_meta(module):
            initialise(module)
        else:
            allocate(module, self.root_device, initialise=self._base_weights is None)

    def _reshard(self) -> None:
        for unit in FullyShardedDataParallel.fsdp_modules(self._wrapped) if self._wrapped is not None else ():
            if unit._handle is not None:
                _reshard(unit, unit._handle, True)

    def _reshard_merged(self, *_: Any) -> None:
        # Without a backward pass FSDP keeps the outermost unit gathered: what unmerge or eject write would be lost.
        if not torch.is_grad_enabled() and is_merged(self._module):
            self._reshard()

    def _gathered(self, host: nn.Module) -> AbstractContextManager[Any]:  # type: ignore[override]
        if self._wrapped is None or not self._is_wrapped:
            return nullcontext()
        units = [unit for unit in FullyShardedDataParallel.fsdp_modules(self._wrapped) if host in unit.modules()]
        return FullyShardedDataParallel.summon_full_params(units[-1], recurse=False)


def _refuse_wrapped(module: nn.Module) -> None:
    if any(isinstance(part, FullyShardedDataParallel) for part in module.modules()):
        raise PEFTError(
            f"{type(module).__name__} wraps parts of itself in FSDP, so the adapters would be flattened into them. "
            "Leave the wrapping to the strategy (auto_wrap_policy), or use ModelParallelStrategy with fully_shard."
        )


def _leaving_out(kwargs: dict[str, Any], modules: list[nn.Module]) -> dict[str, Any]:
    """Return FSDP's arguments with ``modules`` added to what it ignores."""
    states = list(kwargs.get("ignored_states") or ())
    if states and isinstance(states[0], nn.Parameter):
        return {**kwargs, "ignored_states": [*states, *(p for module in modules for p in module.parameters())]}
    rest = {key: value for key, value in kwargs.items() if key != "ignored_states"}
    return {**rest, "ignored_modules": [*states, *(kwargs.get("ignored_modules") or ()), *modules]}
