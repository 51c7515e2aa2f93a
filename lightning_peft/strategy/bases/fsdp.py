"""FSDP1: the frozen model in shards, the adapters whole on every process.

FSDP1 flattens the parameters of a unit into one, of one dtype, whose gradient it allocates and reduces as a whole:
adapters inside would cost the gradient traffic of the entire model. So they are left out of its units.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.distributed as dist
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

from lightning_peft.core.adapter import clean_name
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.operations.mergeable import refuse_ties
from lightning_peft.operations.shards import keep_units, knows_units, resharded
from lightning_peft.storage.base_weights import allocate, has_meta, materialise
from lightning_peft.storage.fingerprint import record_base
from lightning_peft.storage.state import adapter_parameters_and_whole
from lightning_peft.strategy.bases.plain import PlainState
from lightning_peft.strategy.bases.sharded import OnShards


class OnFSDP(OnShards, PlainState, FSDPStrategy):
    """What ``PEFTStrategy`` does differently on ``FSDPStrategy``."""

    _leaves_frozen = False
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

    def _inject(self) -> None:
        if self._is_plain and any(isinstance(part, FullyShardedDataParallel) for part in self._module.modules()):
            raise PEFTError(
                "A run on FSDP left this module plain (merge_on_train_end='unload') and in shards, to which no "
                "adapters can be added. Build the module anew for another fit."
            )
        super()._inject()

    def _without_values(self) -> set[str]:
        """Leave out what the user has a function for."""
        return set() if self.kwargs.get("param_init_fn") else super()._without_values()

    def _place_adapters(self) -> None:
        if not self._is_wrapped:
            _refuse_wrapped(self._module)
            _refuse_most(self._module)
            if self._merge_on_train_end:
                refuse_ties(ModelView(self._module))
            record_base(ModelView(self._module))
        for _, _, slot in ModelView(self._module).slots:
            materialise(slot, self.root_device)
        for parameter in self._left_out():
            parameter.data = parameter.data if parameter.is_meta else parameter.data.to(self.root_device)

    def _left_out(self) -> list[nn.Parameter]:
        """Return what FSDP has no part in: adapters, and parameters of the base that are trained."""
        tensors = adapter_parameters_and_whole(ModelView(self._module)).values()
        return [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]

    def _apply_held_back(self) -> None:
        """Wait until the module is wrapped: only then all that is trained has memory, and the base its weights."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        """Wrap the module without what is trained. One that was wrapped before keeps its wrapper.

        Lightning drops the outermost wrapper after each run, although parameters stay flattened into it.
        """
        if self._is_wrapped:
            assert self._wrapped is not None
            super()._apply_held_back()
            return self._wrapped
        given, shapes = self.kwargs, {clean_name(name): p.shape for name, p in model.named_parameters()}
        self.kwargs = _leaving_out(given, self._left_out())
        # FSDP knows nothing of modules that are left out when it materialises those inside a unit.
        self.kwargs["param_init_fn"] = partial(self._materialise, given.get("param_init_fn"))
        try:
            wrapped = super()._setup_model(model)
        finally:
            self.kwargs = given
        assert isinstance(wrapped, FullyShardedDataParallel)
        self._wrapped = wrapped
        keep_units(wrapped, shapes)
        with FullyShardedDataParallel.summon_full_params(wrapped, recurse=False):
            pass  # The first unit that is gathered takes itself for the outermost one.
        self._load_base_weights()
        for parameter in self._left_out():
            dist.broadcast(parameter.detach(), src=0)
        super()._apply_held_back()
        return wrapped

    def post_backward(self, closure_loss: Tensor) -> None:
        """Give modules their parameters back if nothing is sharded (one process).

        Where backward did not reach, torch would take the tensors that modules read for new parameters.
        """
        super().post_backward(closure_loss)
        assert self._wrapped is not None
        if self._wrapped.sharding_strategy is ShardingStrategy.NO_SHARD:
            resharded(self._module)

    def _materialise(self, initialise: Callable[[nn.Module], None] | None, module: nn.Module) -> None:
        if initialise is not None and has_meta(module):
            initialise(module)
        else:
            allocate(module, self.root_device, initialise=self._base_weights is None)


def _refuse_wrapped(module: nn.Module) -> None:
    if knows_units(module):
        raise PEFTError(
            f"This {type(module).__name__} was cut up by the strategy of another Trainer, which alone has the way to "
            "its parameters. Use that Trainer again; or build the module anew and pass ckpt_path, or load_adapter."
        )
    if any(isinstance(part, FullyShardedDataParallel) for part in module.modules()):
        raise PEFTError(
            f"{type(module).__name__} wraps parts of itself in FSDP, so the adapters would be flattened into them. "
            "Leave the wrapping to the strategy (auto_wrap_policy), or use ModelParallelStrategy with fully_shard."
        )


def _refuse_most(module: nn.Module) -> None:
    base = ModelView(module).parameters
    trained = sum(p.numel() for p in base.values() if p.requires_grad)
    total = sum(p.numel() for p in base.values())
    if trained > total / 2:
        raise PEFTError(
            f"{trained:,} of the base's {total:,} parameters are trained. On FSDP, PEFTStrategy keeps what is trained "
            "whole on every process. Use Lightning's own FSDPStrategy, or PEFTStrategy on ModelParallelStrategy."
        )


def _leaving_out(kwargs: dict[str, Any], parameters: list[nn.Parameter]) -> dict[str, Any]:
    """Return FSDP's arguments with ``parameters`` added to what it ignores."""
    states = [*(kwargs.get("ignored_states") or ()), *(kwargs.get("ignored_modules") or ())]
    given = [p for s in states for p in ([s] if isinstance(s, nn.Parameter) else s.parameters())]
    rest = {key: value for key, value in kwargs.items() if key != "ignored_modules"}
    return {**rest, "ignored_states": [*given, *parameters]}
