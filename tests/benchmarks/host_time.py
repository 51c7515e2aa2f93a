"""What does an adapter cost the host, in calls of Python and in microseconds a layer? What narrow models wait for.

A model so narrow that its kernels take no time, on one thread. Calls are counted and the same on every machine; times
are those of the process, so that others on the machine do not count, and the lower quartile of many rounds.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from benchmarks import measure, subjects, variants
from benchmarks.report import Options, Table, answer

NARROW = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
}
PARTS = ("forward", "backward")


def python_calls(run: Callable[[], object]) -> int:
    """Return how many functions written in Python ``run`` calls."""
    count = 0

    def see(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(see)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def calls_per_layer(name: str, subject: subjects.Subject, hidden: Tensor) -> float:
    """Return how many calls a variant makes beyond the frozen model's, forward, for each adapted layer."""
    bound, variant = (variants.present(which)[0].build(subject) for which in (variants.BOUND, name))
    counted = []
    for model in (bound, variant):
        model(hidden)
        counted.append(python_calls(lambda model=model: model(hidden)))
    return (counted[1] - counted[0]) / adapted(subject)


def adapted(subject: subjects.Subject) -> int:
    """Return how many layers of a subject get an adapter."""
    linear = (name for name, module in subject.named_modules() if isinstance(module, nn.Linear))
    return sum(name.endswith(subject.targets) for name in linear)


class Case:
    """One variant, timed a forward and a backward pass at a time, in microseconds of the process."""

    def __init__(self, model: nn.Module, hidden: Tensor) -> None:
        self.model, self.hidden = model, hidden

    def __call__(self) -> Mapping[str, float]:
        marks = [time.process_time_ns()]
        output = self.model(self.hidden)
        marks.append(time.process_time_ns())
        measure.backward(output)
        marks.append(time.process_time_ns())
        self.model.zero_grad(set_to_none=True)
        self.hidden.grad = None
        return {part: (marks[i + 1] - marks[i]) / 1000 for i, part in enumerate(PARTS)}


def main(options: Options) -> list[Table]:
    """Count calls and time what they take."""
    columns = ["adapters", "variant", "calls", *(f"{part}, μs" for part in PARTS), "together, μs"]
    title = "Beside a frozen layer of a model of width 32: Python's calls forward, and microseconds of the host"
    table = Table("host_time", title, columns)
    shape = subjects.Shape(subjects.LlamaConfig(**NARROW), 1, 8)
    torch.set_num_threads(1)
    for what, dtype in (("of the base's dtype", torch.float32), ("float32, the base bfloat16", torch.bfloat16)):
        subject, hidden = shape.build("cpu", dtype), shape.inputs("cpu", dtype)
        # The peers beside HF peft do not compute in two dtypes.
        wanted = () if dtype == torch.float32 else (variants.BOUND, variants.OURS, variants.PEFT)
        chosen = [variant for variant in variants.present(*wanted) if variant.name != variants.FULL]
        cases = {variant.name: Case(variant.build(subject), hidden) for variant in chosen}
        gc.disable()
        rounds = measure.in_turns(cases, 5 if options.quick else 20 * options.rounds)
        gc.enable()
        low = {(n, p): statistics.quantiles([turn[n][p] for turn in rounds], n=4)[0] for n in cases for p in PARTS}
        for name in cases:
            if name != variants.BOUND:
                beside = [(low[name, part] - low[variants.BOUND, part]) / adapted(subject) for part in PARTS]
                table.rows.append([what, name, calls_per_layer(name, subject, hidden), *beside, sum(beside)])
    table.notes += variants.notes("cpu")
    return [table]


if __name__ == "__main__":
    answer(main)
