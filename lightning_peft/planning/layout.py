"""How a base strategy lays a model out on devices, and in which dtypes a precision keeps it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_peft.core.adapter import CHILD
from lightning_peft.errors import PEFTError

Kind = Literal["single_device", "ddp", "fsdp", "model_parallel", "deepspeed"]
Sharding = Literal["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "_HYBRID_SHARD_ZERO2"]

_TRUE = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}
_MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
# Bits of a weight with its share of the scales. QLoRA (Dettmers et al., 2023), arXiv:2305.14314, section 3: a float32
# for each 64 weights, or with double quantisation 8 bits for each 64 and a float32 for each 64 · 256. int8: by row.
_BITS = {"nf4": 4.5, "fp4": 4.5, "nf4-dq": 4.127, "fp4-dq": 4.127, "int8": 8.0, "int8-training": 8.0}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A base strategy on so many devices.

    Args:
        kind: The family of the strategy.
        devices: Devices in each node; one process each.
        num_nodes: Nodes.
        sharding: Of FSDP.
        wrapped: FSDP has an ``auto_wrap_policy`` that makes each block a unit; otherwise the whole model is one.
        data_parallel_size: Of ModelParallel; ``"auto"`` is the number of nodes, as in Lightning.
        tensor_parallel_size: Of ModelParallel; ``"auto"`` is the number of devices in a node.
        stage: Of DeepSpeed's ZeRO, 0 to 3.
        offload_optimizer: DeepSpeed keeps the optimizer's state and the gradients for it in host memory.
        offload_parameters: The shards of the frozen weights are kept in host memory (ZeRO-3, FSDP).
        bucket: Elements that DeepSpeed reduces at a time; it allocates a buffer for them.

    Raises:
        PEFTError: There is no such strategy, or it cannot run on so many devices.
    """

    kind: Kind
    devices: int = 1
    num_nodes: int = 1
    sharding: Sharding = "FULL_SHARD"
    wrapped: bool = True
    data_parallel_size: int | Literal["auto"] = "auto"
    tensor_parallel_size: int | Literal["auto"] = "auto"
    stage: int = 2
    offload_optimizer: bool = False
    offload_parameters: bool = False
    bucket: int = 200_000_000

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise PEFTError(f"The base {self.kind!r} was given; bases are {', '.join(get_args(Kind))}.")
        if self.sharding not in get_args(Sharding):
            raise PEFTError(f"sharding_strategy={self.sharding!r} was given; it is {', '.join(get_args(Sharding))}.")
        if self.devices < 1 or self.num_nodes < 1:
            raise PEFTError(f"devices={self.devices}, num_nodes={self.num_nodes} were given; both are at least 1.")
        if self.kind == "single_device" and self.world_size > 1:
            raise PEFTError(
                f"{self.world_size} devices were given with the base single_device, which uses one. Take ddp, or "
                "devices=1."
            )
        if self.kind == "model_parallel" and self.data_parallel * self.tensor_parallel != self.world_size:
            raise PEFTError(
                f"data_parallel_size={self.data_parallel} times tensor_parallel_size={self.tensor_parallel} is "
                f"{self.data_parallel * self.tensor_parallel}, but there are {self.num_nodes} · {self.devices} = "
                f"{self.world_size} devices. Make the two equal."
            )
        if self.stage not in range(4):
            raise PEFTError(f"stage={self.stage} was given; ZeRO has the stages 0, 1, 2 and 3.")
        if self.kind == "deepspeed" and self.offload_parameters and self.stage < 3:
            raise PEFTError(f"offload_parameters was given with ZeRO stage {self.stage}; it needs stage 3.")

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.devices * self.num_nodes

    @property
    def data_parallel(self) -> int:
        """Processes that the batch is divided among, of ModelParallel."""
        return self.num_nodes if self.data_parallel_size == "auto" else self.data_parallel_size

    @property
    def tensor_parallel(self) -> int:
        """Processes that a layer is divided among."""
        return self.devices if self.tensor_parallel_size == "auto" else self.tensor_parallel_size

    @property
    def shards(self) -> int:
        """Processes that share one copy of the frozen weights."""
        if self.kind == "fsdp" and self.sharding != "NO_SHARD":
            return self.devices if "HYBRID" in self.sharding else self.world_size
        if self.kind == "model_parallel":
            return self.data_parallel
        return self.world_size if self.kind == "deepspeed" and self.stage == 3 else 1

    def __str__(self) -> str:
        if self.kind == "fsdp":
            extra = ("" if self.wrapped else " as one unit") + (" with CPU offload" if self.offload_parameters else "")
            return f"FSDP {self.sharding}{extra}"
        if self.kind == "model_parallel":
            return f"ModelParallel, data {self.data_parallel} by tensor {self.tensor_parallel}"
        if self.kind == "deepspeed":
            offload = self.offload_optimizer or self.offload_parameters
            return f"DeepSpeed ZeRO-{self.stage}" + (" with offload" if offload else "")
        return {"single_device": "one device", "ddp": "DDP"}[self.kind]


@dataclass(frozen=True)
class Precision:
    """Lightning's ``precision`` and, for a quantised base, the mode of its ``BitsandbytesPrecision``.

    Raises:
        PEFTError: There is no such precision.
    """

    flag: str = "32-true"
    quantize: str | None = None
    quantize_not: tuple[str, ...] = ()
    """Beginnings of the names of linear layers that are not quantised."""

    def __post_init__(self) -> None:
        known = ["32-true", *_TRUE, *_MIXED]
        if self.flag not in known:
            raise PEFTError(f"precision={self.flag!r} was given; a plan can be made for {', '.join(known)}.")
        if self.quantize is not None and self.quantize not in _BITS:
            raise PEFTError(f"The quantisation {self.quantize!r} was given; modes are {', '.join(_BITS)}.")

    def check(self, layout: Layout) -> None:
        """Raise :class:`PEFTError` if ``layout`` cannot have this precision."""
        if self.quantize and layout.kind not in ("single_device", "ddp"):
            raise PEFTError(
                f"A base quantised to {self.quantize} was given with {layout}; Lightning's plugin quantises on one "
                "device and under DDP."
            )

    def autocast(self, layout: Layout) -> torch.dtype | None:
        """Return the dtype of operations under mixed precision; DeepSpeed casts the weights instead."""
        return None if layout.kind == "deepspeed" else _MIXED.get(self.flag)

    def dtype(self, name: str, tensor: Tensor, layout: Layout) -> torch.dtype:
        """Return the dtype in which the parameter or buffer ``name`` is kept; adapters keep theirs, float32."""
        if not tensor.is_floating_point() or CHILD in name.split("."):
            return tensor.dtype
        casts = {**_TRUE, **_MIXED} if layout.kind == "deepspeed" else _TRUE
        return casts.get(self.flag, tensor.dtype)

    def element_bytes(self, name: str, parameter: nn.Parameter, module: nn.Module, layout: Layout) -> float:
        """Return what an element of the parameter ``name`` of ``module`` takes."""
        frozen_weight = isinstance(module, nn.Linear) and parameter is module.weight and not parameter.requires_grad
        if self.quantize and frozen_weight and not name.startswith(self.quantize_not):
            return _BITS[self.quantize] / 8
        return self.dtype(name, parameter, layout).itemsize
