"""A memory plan as text: what a device holds, and the other base strategies beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn

from lightning_peft.core.registry import registries
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.planning.activations import step_bytes
from lightning_peft.planning.layout import Layout, Precision
from lightning_peft.planning.memory import ROOM, Memory, alternatives, plan
from lightning_peft.structure.inner_models import transformers_models

GIB = 2**30
_UNITS = {GIB: "GiB", 2**20: "MiB", 2**10: "KiB"}


@dataclass(frozen=True)
class Batch:
    """What a device computes in a step."""

    size: int
    sequence_length: int
    gradient_checkpointing: bool

    def __str__(self) -> str:
        how = "with" if self.gradient_checkpointing else "without"
        return f"a batch of {self.size}, {self.sequence_length:,} tokens each, {how} gradient checkpointing"


class Report(NamedTuple):
    """A memory plan."""

    text: str
    fits: bool
    """Whether the run, or one of the other bases, fits the device; also if its memory is not known."""
    run: Memory
    """What the run itself needs."""
    bases: Mapping[str, Memory]
    """What it would need on each base, by its name."""


def report(module: nn.Module, layout: Layout, precision: Precision, batch: Batch, capacity: float | None) -> Report:
    """Return the plan.

    Args:
        module: The model with its adapters, best on the meta device.
        layout: Base strategy and devices.
        precision: Lightning's precision.
        batch: Of one device.
        capacity: Bytes of a device's memory, if known.
    """
    steps = _Steps(module, precision)
    run = plan(module, layout, precision, step=steps.bytes(batch, layout))
    bases: dict[str, Memory] = {}
    for choice in alternatives(layout):
        with suppress(PEFTError):  # not with this precision
            bases[str(choice)] = plan(module, choice, precision, step=steps.bytes(batch, choice))
    text = "\n".join(_lines(module, layout, precision, batch, capacity, steps, run, bases))
    fits = capacity is None or any(memory.fits(capacity) for memory in (run, *bases.values()))
    return Report(text, fits, run, bases)


def _lines(
    module: nn.Module,
    layout: Layout,
    precision: Precision,
    batch: Batch,
    capacity: float | None,
    steps: _Steps,
    memory: Memory,
    bases: Mapping[str, Memory],
) -> Iterator[str]:
    yield from _headed("", _heading(module, layout, precision))
    yield from _headed("on each device", [*_rows(memory), ("total", _verdict(memory, capacity))])
    yield f"  Activations are an estimate for {batch}."
    other = replace(batch, gradient_checkpointing=not batch.gradient_checkpointing)
    needed = steps.bytes(other, layout)
    how = "With" if other.gradient_checkpointing else "Without"
    yield f"  {how} it they would be {size(needed)}." if needed is not None else f"  They are unknown: {steps.reason}"
    files = [("adapter", memory.adapter_file), ("to resume from", memory.checkpoint), ("whole", memory.full_checkpoint)]
    yield from _headed("files", [(name, size(count)) for name, count in files])
    rows = [(name, _verdict(planned, capacity)) for name, planned in bases.items()]
    yield from _headed(f"every base on {_devices(layout)}", rows)
    if capacity is not None:
        yield f"  {ROOM:.0%} of the memory is planned with. The rest is for CUDA itself, kernels and fragmentation."


def size(count: float) -> str:
    """Write a number of bytes for reading."""
    unit, name = next((unit for unit in _UNITS.items() if count >= unit[0]), (2**10, "KiB"))
    return f"{count / unit:,.1f} {name}"


class _Steps:
    """Bytes of a training step; each kind of step is run once."""

    def __init__(self, module: nn.Module, precision: Precision) -> None:
        self._module, self._precision = module, precision
        self._known: dict[tuple[Batch, torch.dtype | None, torch.dtype], int | None] = {}
        self.reason = ""

    def bytes(self, batch: Batch, layout: Layout) -> int | None:
        kept_as = self._precision.dtype("", torch.empty(0, dtype=torch.float32), layout)
        key = (batch, self._precision.autocast(layout), kept_as)
        if key not in self._known:
            self._known[key] = self._run(batch, layout)
        return self._known[key]

    def _run(self, batch: Batch, layout: Layout) -> int | None:
        models = transformers_models(ModelView(self._module))
        if len(models) != 1:
            self.reason = f"they are known for one transformers model, and {len(models)} were found."
            return None
        ((prefix, model),) = models.items()
        try:
            return step_bytes(
                model,
                batch.size,
                batch.sequence_length,
                dtype_of=lambda name, tensor: self._precision.dtype(f"{prefix}.{name}", tensor, layout),
                autocast=self._precision.autocast(layout),
                gradient_checkpointing=batch.gradient_checkpointing,
            )
        except PEFTError as error:
            self.reason = str(error)
            return None


def _heading(module: nn.Module, layout: Layout, precision: Precision) -> Iterator[tuple[str, str]]:
    view = ModelView(module)
    models = list(transformers_models(view).values()) or [module]
    total = sum(p.numel() for p in module.parameters())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    yield "model", type(models[0]).__name__
    yield "parameters", f"{total:,}, of which {trained:,} are trained ({trained / max(total, 1):.2%})"
    for _, _, registry in registries(view):
        for method in (method for methods in registry.methods.values() for method in methods):
            settings = {key: value for key, value in method.config().items() if value and key != "method"}
            yield "method", " ".join([method.name, *(f"{key}={value}" for key, value in settings.items())])
    yield "base", f"{layout}, {_devices(layout)}"
    yield "precision", precision.flag + (f", linear layers in {precision.quantize}" if precision.quantize else "")


def _rows(memory: Memory) -> list[tuple[str, str]]:
    rows = {
        "frozen weights": memory.weights,
        "trained weights": memory.trained,
        "gradients": memory.gradients,
        "AdamW's state": memory.optimizer,
        "gathered for a while": memory.gathered,
        "gradient buffers": memory.buffers,
        "activations": memory.step,
    }
    if memory.host:
        rows["(in host memory)"] = memory.host
    return [(name, "unknown" if count is None else size(count)) for name, count in rows.items() if count != 0]


def _verdict(memory: Memory, capacity: float | None) -> str:
    text = size(memory.total) + (" and activations" if memory.step is None else "")
    if capacity is None:
        return text
    return f"{text:<9}  {'fits' if memory.fits(capacity) else 'does not fit'} {size(capacity)}"


def _devices(layout: Layout) -> str:
    nodes = f"{layout.num_nodes} nodes with " if layout.num_nodes > 1 else ""
    return f"{nodes}{layout.devices} device{'s' if layout.devices > 1 else ''}"


def _headed(heading: str, rows: Iterator[tuple[str, str]] | list[tuple[str, str]]) -> Iterator[str]:
    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0)
    if heading:
        yield f"\n{heading}"
    yield from (f"  {name:<{width}}  {text}" for name, text in rows)
