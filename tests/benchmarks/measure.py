"""Counting what is deterministic, and timing in turns: ratios within a round cancel what the machine's load does."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

Timed = Callable[[], Mapping[str, float]]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        values = list(values)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def in_turns(cases: Mapping[Any, Timed], rounds: int, warmup: int = 1) -> list[dict[Any, Mapping[str, float]]]:
    """Run every case once in every round and return the rounds after the first ``warmup``.

    The order is another in every round: a case that always followed the same would always find the caches as it leaves
    them.
    """
    orders = [random.Random(turn).sample(list(cases), len(cases)) for turn in range(warmup + rounds)]
    return [{name: cases[name]() for name in order} for order in orders][warmup:]


def ratios(rounds: list[dict[Any, Mapping[str, float]]], case: Any, reference: Any, what: str) -> Spread:
    """Return what ``case`` took, divided by what ``reference`` took in the same round."""
    return Spread.of(turn[case][what] / turn[reference][what] for turn in rounds)


class Clock:
    """Times one part after the other; on CUDA by events, so that nothing waits for the GPU before the end."""

    def __init__(self, device: str) -> None:
        self._cuda = device != "cpu"
        self._marks: list[Any] = []
        self.mark()

    def mark(self) -> None:
        """End a part and begin the next."""
        if not self._cuda:
            self._marks.append(time.perf_counter())
            return
        self._marks.append(torch.cuda.Event(enable_timing=True))
        self._marks[-1].record()

    def parts(self) -> list[float]:
        """Return the seconds that each part took."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if not self._cuda:
            return [end - begin for begin, end in pairs]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1000 for begin, end in pairs]


def seconds(run: Callable[[], object], device: str = "cpu") -> float:
    """Time one call."""
    clock = Clock(device)
    run()
    clock.mark()
    return clock.parts()[0]


def training_step(model: nn.Module, hidden: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
    """Forward, backward, and an optimizer step if there is something to train."""
    backward(model(hidden))
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    hidden.grad = None


def backward(output: Tensor) -> None:
    """Go backwards from a loss, or from hidden states with a gradient of ones."""
    output.backward(None if output.dim() == 0 else torch.ones_like(output))


def adamw(model: nn.Module) -> torch.optim.Optimizer | None:
    """Return AdamW over what is trained, as users write it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-4) if trained else None


def saved_storages(run: Callable[[], Any], model: nn.Module) -> tuple[dict[int, int], Any]:
    """Return address and bytes of every storage that ``run`` keeps for the backward pass, and what keeps them alive.

    Parameters and buffers of ``model`` are there anyway: they do not count.
    """
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    found: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        alive.append(run())
    return found, alive


def input_storages(run: Callable[[], Any], modules: Iterable[nn.Module]) -> tuple[dict[int, int], Any]:
    """Return address and bytes of every storage that one of ``modules`` gets as input, and what keeps them alive."""
    found: dict[int, int] = {}
    alive = []

    def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        storage = args[0].untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        alive.append(storage)

    handles = [module.register_forward_pre_hook(see) for module in modules]
    alive.append(run())
    for handle in handles:
        handle.remove()
    return found, alive


_ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class _Operators(TorchDispatchMode):
    """Counts what would be launched as kernels: no views, no bare allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not (func.is_view or name in ("_unsafe_view", *_ALLOCATIONS)):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def operators(model: nn.Module, hidden: Tensor) -> tuple[list[str], list[str]]:
    """Return the aten operators that a forward and a backward pass launch, by name."""
    with _Operators() as forward:
        output = model(hidden)
    gradient = torch.ones_like(output)
    with _Operators() as back:
        output.backward(gradient)
    hidden.grad = None
    model.zero_grad(set_to_none=True)
    return forward.seen, back.seen


def peak_bytes(run: Callable[[], object], device: str = "cpu") -> int:
    """Return how far the allocated memory rises above what it was before ``run``."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return max(itertools.accumulate(_allocations(run), initial=0))


def left_bytes(run: Callable[[], object]) -> int:
    """Return how much more is allocated on the CPU after ``run`` than before."""
    return sum(_allocations(run))


def _allocations(run: Callable[[], object]) -> list[int]:
    """Return the bytes allocated (or, if negative, freed) on the CPU during ``run``, in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
