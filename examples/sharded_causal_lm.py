"""A causal language model in parts on many GPUs, by FSDP2: what a module for ``ModelParallelStrategy`` looks like."""

from __future__ import annotations

import torch
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lightning_peft.tasks import CausalLM
from lightning_peft.tasks.pretrained import Dtype


class ShardedCausalLM(CausalLM):
    """``CausalLM`` whose weights are read by the strategy, to each process its own part.

    Give the strategy the directory of the weights as ``base_weights``. The arguments are those of ``CausalLM``.
    """

    def load(self, model: str, cache_dir: str | None, dtype: Dtype) -> PreTrainedModel:
        """Build the model of a directory's configuration, without weights."""
        config = AutoConfig.from_pretrained(model)
        with torch.device("meta"):
            built: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        return built

    def configure_model(self) -> None:
        """Inject the adapters, then shard block by block. Lightning calls this before each run."""
        if isinstance(self.model, FSDPModule):
            return
        # Before fully_shard, so that the adapters are sharded with the blocks that they belong to.
        self.trainer.strategy.inject()  # type: ignore[attr-defined]
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.get_decoder().layers:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
