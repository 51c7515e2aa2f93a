"""Memory of a fine-tuning run on each device, worked out before any weight is loaded."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_peft.core.registry import registries
from lightning_peft.core.view import ModelView
from lightning_peft.planning.layout import Layout, Precision

ROOM = 0.9
"""The part of a device's memory that is planned with. The rest is for CUDA itself, kernels, and fragmentation."""

# AdamW keeps two moments of the parameter's dtype, and a count of steps in a float32 tensor.
_MOMENTS, _STEP_BYTES = 2, 4
# ZeRO keeps a float32 copy of what it trains beside two moments: ZeRO (Rajbhandari et al., 2020), arXiv:1910.02054,
# section 3.1 (K = 12).
_ZERO_STATE = 12
# DeepSpeed's default of stage3_max_live_parameters.
_ZERO3_LIVE = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on the device that holds most, and of the files written."""

    weights: int
    """Frozen weights and buffers."""
    trained: int
    """Adapters and other trained parameters."""
    gradients: int
    optimizer: int
    """AdamW's state."""
    gathered: int
    """Weights of which more than the own shard is there for a while, or which are dequantised for a while."""
    buffers: int
    """What gradients are copied into to be averaged over processes."""
    step: int | None
    """Activations and temporaries of a training step; ``None`` if unknown."""
    host: int
    """In host memory, by process."""
    adapter_file: int
    """Tensors of an adapter."""
    checkpoint: int
    """Tensors of a checkpoint to resume from: adapters and their optimizer state."""
    full_checkpoint: int
    """The same with the frozen weights."""

    @property
    def total(self) -> int:
        """Bytes on the device, without activations if these are unknown."""
        parts = (self.weights, self.trained, self.gradients, self.optimizer, self.gathered, self.buffers)
        return sum(parts) + (self.step or 0)

    def fits(self, capacity: float) -> bool:
        """Whether a device with ``capacity`` bytes can run it, with room to spare."""
        return self.total <= ROOM * capacity


@dataclass(frozen=True, kw_only=True)
class _Parameter:
    """What the arithmetic needs of a parameter."""

    unit: str
    """The block that it is gathered with under FSDP and ModelParallel; ``""`` for what is in no block."""
    rows: int
    elements: int
    bytes: float
    trained: bool
    split: bool
    """Whether tensor parallelism splits it: the weight of a linear layer in a block."""


def plan(model: nn.Module, layout: Layout, precision: Precision, *, step: int | None = None) -> Memory:
    """Work out the memory of training ``model``.

    Adapters are placed as ``PEFTStrategy`` places them: whole on every process on one device, under DDP and FSDP, and
    under ZeRO-1 and 2, which shard their optimizer state; sharded with the model by ``fully_shard`` and by ZeRO-3.
    Without adapters, whatever requires a gradient is placed as the base strategy places it. Blocks are taken to be the
    units of FSDP, and linear layers in blocks to be what tensor parallelism splits (not so the activations: their
    estimate is too high under it).

    Args:
        model: The model with its adapters, best on the meta device; ``requires_grad`` says what is trained.
        layout: Base strategy and devices.
        precision: Lightning's precision.
        step: Bytes of activations and temporaries (:func:`lightning_peft.planning.activations.step_bytes`).

    Raises:
        PEFTError: The precision and the strategy do not go together.
    """
    precision.check(layout)
    parameters = list(_parameters(model, layout, precision))
    frozen = [p for p in parameters if not p.trained]
    trained = [p for p in parameters if p.trained]
    adapted = bool(registries(ModelView(model)))
    constants = sum(b.numel() * precision.dtype(name, b, layout).itemsize for name, b in model.named_buffers())
    trained_shards = 1 if adapted and layout.kind == "fsdp" else layout.shards
    weights = _held(frozen, layout, layout.shards)
    held = _held(trained, layout, trained_shards)
    gradients, state, host = _training(trained, layout, trained_shards)
    if layout.offload_parameters:
        host += weights
        weights = 0
    whole_state = _bytes(trained) * _MOMENTS + _STEP_BYTES * len(trained)
    return Memory(
        weights=weights + constants,
        trained=held,
        gradients=gradients,
        optimizer=state,
        gathered=_gathered(parameters if trained_shards > 1 else frozen, layout, precision),
        buffers=_buffers(trained, layout, adapted),
        step=step,
        host=host,
        adapter_file=_bytes(trained),
        checkpoint=_bytes(trained) + whole_state,
        full_checkpoint=_bytes(parameters) + constants + whole_state,
    )


def alternatives(layout: Layout) -> list[Layout]:
    """Return the bases to choose from on the same devices."""
    where: Any = {"devices": layout.devices, "num_nodes": layout.num_nodes}
    offloaded = Layout(kind="deepspeed", stage=3, offload_optimizer=True, offload_parameters=True, **where)
    if layout.world_size == 1:
        return [Layout(kind="single_device"), offloaded]
    return [
        Layout(kind="ddp", **where),
        *(Layout(kind="deepspeed", stage=stage, **where) for stage in (1, 2)),
        Layout(kind="fsdp", sharding="SHARD_GRAD_OP", **where),
        Layout(kind="fsdp", **where),
        Layout(kind="model_parallel", data_parallel_size=layout.world_size, tensor_parallel_size=1, **where),
        Layout(kind="deepspeed", stage=3, **where),
        offloaded,
    ]


def _parameters(model: nn.Module, layout: Layout, precision: Precision) -> Iterator[_Parameter]:
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        unit = _unit(model, prefix)
        for key, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = f"{prefix}.{key}".lstrip(".")
            yield _Parameter(
                unit=unit,
                rows=parameter.shape[0] if parameter.dim() else 1,
                elements=parameter.numel(),
                bytes=parameter.numel() * precision.element_bytes(name, parameter, module, layout),
                trained=parameter.requires_grad,
                split=bool(unit) and isinstance(module, nn.Linear) and parameter is module.weight,
            )


def _unit(model: nn.Module, name: str) -> str:
    """Return the name of the outermost block around the module ``name``: an entry of a list of modules."""
    parts = name.split(".")
    for end, part in enumerate(parts):
        if part.isdigit() and isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList | nn.Sequential):
            return ".".join(parts[: end + 1])
    return ""


def _held(parameters: Iterable[_Parameter], layout: Layout, shards: int) -> int:
    """Return the bytes of one process, where each parameter is cut along its first dimension."""
    total = 0.0
    for p in parameters:
        ways = layout.tensor_parallel if layout.kind == "model_parallel" and p.split else 1
        # FSDP1 and ZeRO cut flattened units, FSDP2 cuts the rows of each tensor.
        rows = p.rows if layout.kind == "model_parallel" else p.elements
        total += p.bytes / ways * math.ceil(rows / shards) / max(rows, 1)
    return math.ceil(total)


def _training(trained: list[_Parameter], layout: Layout, shards: int) -> tuple[int, int, int]:
    """Return the bytes of gradients and optimizer state on the device, and of both in host memory."""
    gradients = _held(trained, layout, shards)
    if layout.kind != "deepspeed" or layout.stage == 0:
        return gradients, gradients * _MOMENTS + _STEP_BYTES * len(trained), 0
    share = math.ceil(sum(p.elements for p in trained) / layout.world_size)
    if layout.stage >= 2:
        gradients = math.ceil(_bytes(trained) / layout.world_size)
    if layout.offload_optimizer:
        return 0, 0, gradients + _ZERO_STATE * share
    return gradients, _ZERO_STATE * share, 0


def _gathered(parameters: list[_Parameter], layout: Layout, precision: Precision) -> int:
    if precision.quantize:
        # One weight at a time is dequantised, to 16 bits.
        return 2 * max((p.elements for p in parameters if p.split), default=0)
    if layout.shards == 1 and not layout.offload_parameters:
        return 0
    if layout.kind == "deepspeed":
        elements = sum(p.elements for p in parameters)
        return math.ceil(_bytes(parameters) * min(1, _ZERO3_LIVE / max(elements, 1)))
    ways = layout.tensor_parallel if layout.kind == "model_parallel" else 1
    units: dict[str, float] = defaultdict(float)
    for p in parameters:
        units[p.unit] += p.bytes / (ways if p.split else 1)
    outside = units.pop("", 0.0)
    if not layout.wrapped or layout.sharding in ("SHARD_GRAD_OP", "_HYBRID_SHARD_ZERO2"):
        return math.ceil(outside + sum(units.values()))
    # What is in no block stays gathered from the forward to the backward pass. Of the blocks there is the one that
    # runs and the next one, which is on its way.
    return math.ceil(outside + sum(sorted(units.values())[-2:]))


def _buffers(trained: list[_Parameter], layout: Layout, adapted: bool) -> int:
    if layout.kind == "ddp" or (layout.kind == "fsdp" and adapted and layout.world_size > 1):
        return _bytes(trained)
    if layout.kind == "deepspeed" and layout.stage > 0:
        widest = max((p.bytes / p.elements for p in trained if p.elements), default=0)
        # ZeRO-1 and 2 fill one bucket while they reduce the other.
        return math.ceil(widest * layout.bucket * (1 if layout.stage == 3 else 2))
    return 0


def _bytes(parameters: Iterable[_Parameter]) -> int:
    return math.ceil(sum(p.bytes for p in parameters))
