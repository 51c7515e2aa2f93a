"""A causal language model in parts on many GPUs, by FSDP2: what a module for ``ModelParallelStrategy`` looks like."""

from __future__ import annotations

from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel

from lightning_peft.errors import PEFTError
from lightning_peft.tasks.causal_lm import CausalLM
from lightning_peft.tasks.pretrained import Dtype, meta_model


class ShardedCausalLM(CausalLM):
    """`CausalLM` whose weights are read by the strategy, to each process its own part.

    Give the strategy the directory of the weights as `base_weights`, and `ModelParallelStrategy` as its base. The
    arguments are those of `CausalLM`.
    """

    def load(self, model: str, cache_dir: str | None, dtype: Dtype) -> PreTrainedModel:
        """Build the model of a directory's configuration, without weights."""
        return meta_model(model, self.auto_class, dtype=dtype)

    def configure_model(self) -> None:
        """Inject the adapters, then shard block by block. Lightning calls this before each run.

        Raises:
            PEFTError: The strategy is no PEFTStrategy on a ModelParallelStrategy, or has no ``base_weights``.
        """
        if isinstance(self.model, FSDPModule):
            return
        mesh, inject = self.device_mesh, getattr(self.trainer.strategy, "inject", None)
        if mesh is None or inject is None:
            raise PEFTError(
                f"ShardedCausalLM was given to {type(self.trainer.strategy).__name__}, which cuts up nothing. It needs "
                "PEFTStrategy(..., base=ModelParallelStrategy(), base_weights=...); elsewhere use CausalLM."
            )
        if self.trainer.strategy._base_weights is None:  # type: ignore[attr-defined]
            raise PEFTError(
                "ShardedCausalLM is built without weights, and the strategy was given none: they would be random. Give "
                f"it the model's directory: PEFTStrategy(..., base_weights={self.hparams['model']!r})."
            )
        # Before fully_shard, so that the adapters are sharded with the blocks that they belong to.
        inject()
        for block in self.model.get_decoder().layers:
            fully_shard(block, mesh=mesh["data_parallel"])
        fully_shard(self.model, mesh=mesh["data_parallel"])
