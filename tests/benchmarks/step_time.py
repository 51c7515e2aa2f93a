"""How long does a training step take, forward and backward, beside the frozen bound and HF peft?"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from benchmarks import bounds, measure, subjects, variants
from benchmarks.report import Options, Table, answer, machine

PARTS = ("forward", "backward", "step")


class Case:
    """One variant with its optimizer, timed a step at a time."""

    def __init__(self, model: nn.Module, hidden: Tensor, device: str) -> None:
        self.model, self.hidden, self.device = model, hidden, device
        self.optimizer = measure.adamw(model)

    def __call__(self) -> Mapping[str, float]:
        clock = measure.Clock(self.device)
        output = self.model(self.hidden)
        clock.mark()
        measure.backward(output)
        clock.mark()
        if self.optimizer is not None:
            self.optimizer.step()
        clock.mark()
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        self.hidden.grad = None
        parts = clock.parts()
        return {"forward": parts[0], "backward": parts[1], "step": sum(parts)}


def main(options: Options) -> list[Table]:
    """Time training steps."""
    columns = ["model", "dropout", "variant", *(f"{part} / bound" for part in PARTS), "step / HF peft", "at least"]
    table = Table("step_time", "Training step: medians (and quartiles) of ratios within a round", columns)
    for name, shape in subjects.shapes(options.quick, options.device, options.model).items():
        subject, hidden = shape.build(options.device, options.dtype), shape.inputs(options.device, options.dtype)
        large = options.device == "cpu" and "Llama" in name
        wanted = (variants.BOUND, variants.OURS, variants.PEFT) if large and "70B" in name else ()
        cases = {
            (variant.name, dropout): Case(variant.build(subject, dropout), hidden, options.device)
            for variant in variants.present(*wanted)
            for dropout in variant.dropouts
        }
        # A round of a large layer takes a minute, and its spread is small.
        rounds = measure.in_turns(cases, max(1, options.rounds // 2) if large else options.rounds)
        line = bounds.at_least(shape, machine(options.device))
        for variant, dropout in cases:
            against = [measure.ratios(rounds, (variant, dropout), (variants.BOUND, 0.0), part) for part in PARTS]
            peer = (variants.PEFT, dropout)
            beside = measure.ratios(rounds, (variant, dropout), peer, "step") if peer in cases else "-"
            # No line but the bound holds for what has no adapters.
            shown = "-" if variant in (variants.BOUND, variants.FULL) else bounds.beside(line, against[-1])
            table.rows.append([name, f"{dropout:g}", variant, *against, beside, shown])
        del cases, subject
    table.notes += variants.notes(options.device)
    return [table]


if __name__ == "__main__":
    answer(main)
