"""ModelParallelStrategy: FSDP2 (``fully_shard``) and tensor parallelism, applied by the user in ``configure_model``.

Adapters injected there before ``fully_shard`` are sharded with the model; without a call, or if they share parameters,
they are injected at ``setup`` and kept whole on every process. Beside a layer that is split by tensor parallelism they
are split as that layer is, so they have to come after ``parallelize_module``, which cannot split a layer that has
children.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_peft.core.registry import registries
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.operations.eject import eject
from lightning_peft.storage.base_weights import materialise
from lightning_peft.storage.fingerprint import record_base
from lightning_peft.strategy.bases.plain import PlainState
from lightning_peft.strategy.bases.sharded import OnShards
from lightning_peft.strategy.bases.tensor_parallel import TENSOR, split_adapters

_DATA = "data_parallel"


class OnModelParallel(OnShards, PlainState, ModelParallelStrategy):
    """What ``PEFTStrategy`` does differently on ``ModelParallelStrategy``."""

    _takes_sharded = True

    @property
    def _saves_shards(self) -> bool:
        return self._save_distributed_checkpoint

    def inject(self) -> None:
        """Inject the adapters before the module is sharded; later, at ``setup``, if they share what is trained.

        ``fully_shard`` cannot cut up a parameter that is in several of its units.
        """
        new = not registries(ModelView(self._module))
        super().inject()
        if new and _is_shared(self._module):
            eject(self._module)

    def _inject(self) -> None:
        new = not registries(ModelView(self._module))
        super()._inject()
        if new:
            try:
                split_adapters(ModelView(self._module), self.device_mesh[TENSOR])
            except PEFTError:
                eject(self._module)
                raise

    def _place_adapters(self) -> None:
        for _, _, slot in ModelView(self._module).slots:
            materialise(slot, self.root_device)
        super()._place_adapters()
        record_base(ModelView(self._module))

    def _replicated(self) -> list[tuple[list[nn.Parameter], Any]]:
        trained = [p for p in self._module.parameters() if p.requires_grad]
        return [
            ([p for p in trained if not isinstance(p, DTensor)], None),
            # FSDP2 averages the gradients of what it shards.
            ([p for p in trained if _is_split_only(p)], self.device_mesh[_DATA].get_group()),
        ]


def _is_shared(module: nn.Module) -> bool:
    """Whether adapters of several hosts have a parameter in common."""
    every = [id(parameter) for _, _, slot in ModelView(module).slots for parameter in slot.parameters()]
    return len(every) != len(set(every))


def _is_split_only(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, DTensor) and _DATA not in (parameter.device_mesh.mesh_dim_names or ())
