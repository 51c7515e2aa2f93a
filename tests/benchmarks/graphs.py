"""What does a training step gain from one CUDA graph, which launches all of its kernels at once? For GPUs alone.

Forward, backward and AdamW are captured once and replayed, on an input that stays where it was. A graph has to train
what the step as it is trains: how far the two are apart after a few steps stands beside the times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from benchmarks import measure, subjects, variants
from benchmarks.report import Options, Table, answer

STEPS = 4
"""After so many the weights are compared."""

Replay = Callable[[], object]


class Step:
    """A training step of a variant: it reads and writes the same tensors whenever it is called."""

    def __init__(self, model: nn.Module, hidden: Tensor) -> None:
        self.model, self.hidden = model, hidden
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        on_gpu = hidden.device.type == "cuda"
        self.optimizer = (
            torch.optim.AdamW(self.trained, lr=1e-4, fused=True, capturable=on_gpu) if self.trained else None
        )

    def __call__(self) -> None:
        measure.training_step(self.model, self.hidden, self.optimizer)

    def begin_again(self, start: list[Tensor]) -> None:
        """Put the weights, and the optimizer's state, back where they were."""
        with torch.no_grad():
            for parameter, value in zip(self.trained, start, strict=True):
                parameter.copy_(value)
            for state in [] if self.optimizer is None else self.optimizer.state.values():
                for value in state.values():
                    value.zero_()


def capture(step: Step) -> Replay:
    """Return what replays a step as one graph."""
    # What is allocated, or chosen, once only must not be part of the graph.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def apart(step: Step, replay: Replay, start: list[Tensor]) -> float:
    """Return how far a step and its replay are apart after some steps, as a part of what the weights moved: norms."""
    found = []
    for run in (step, replay):
        step.begin_again(start)
        for _ in range(STEPS):
            run()
        found.append([parameter.detach().clone() for parameter in step.trained])
    step.begin_again(start)

    def distance(one: list[Tensor], other: list[Tensor]) -> float:
        return math.hypot(*(float((a - b).float().norm()) for a, b in zip(one, other, strict=True)))

    return distance(*found) / distance(found[0], start)


def main(options: Options) -> list[Table]:
    """Time steps as they are and as one graph."""
    if options.device == "cpu":
        raise SystemExit("benchmarks.graphs measures CUDA graphs: run it with --device cuda on a machine with a GPU.")
    columns = ["model", "variant", "one graph / as it is", "one graph / bound's graph", "apart", "apart without graphs"]
    table = Table("graphs", "A training step as one CUDA graph: medians (and quartiles) of ratios", columns)
    for name, shape in subjects.shapes(options.quick, options.device, options.model).items():
        subject, hidden = shape.build(options.device, options.dtype), shape.inputs(options.device, options.dtype)
        cases: dict[tuple[str, str], measure.Timed] = {}
        distances: dict[str, list[str]] = {}
        for variant in variants.present():
            step = Step(variant.build(subject), hidden)
            start = [parameter.detach().clone() for parameter in step.trained]
            # One that cannot be captured ends the run: what follows would be captured with it.
            replay = capture(step)
            pairs = (replay, step) if step.trained else ()
            distances[variant.name] = [f"{apart(step, other, start):.1e}" for other in pairs] or ["-", "-"]
            cases[variant.name, "step"] = _timed(step, options.device)
            cases[variant.name, "graph"] = _timed(replay, options.device)
        rounds = measure.in_turns(cases, options.rounds)
        for variant_name, distance in distances.items():
            own = measure.ratios(rounds, (variant_name, "graph"), (variant_name, "step"), "step")
            bound = (variants.BOUND, "graph")
            beside = measure.ratios(rounds, (variant_name, "graph"), bound, "step")
            table.rows.append([name, variant_name, own, beside, *distance])
        del cases, subject
    table.notes.append(f"Apart: after {STEPS} steps, as a part of how far the weights moved. AdamW is fused in both.")
    table.notes += variants.notes(options.device)
    return [table]


def _timed(run: Replay, device: str) -> measure.Timed:
    def timed() -> Mapping[str, float]:
        return {"step": measure.seconds(run, device)}

    return timed


if __name__ == "__main__":
    answer(main)
