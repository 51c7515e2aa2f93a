"""What can no LoRA be faster than? Three lines above the frozen bound, worked out for each model of the tables.

*Arithmetic*: its products, counted (forward and backward, attention and head included). *Traffic*: what the adapters
read and write beside the layers, at a card's full bandwidth, where a frozen layer's products reach 60 % of its peak.
*Launches*: six kernels beside a layer (two forward; dY B, dA, dB and dX's sum backward), where all kernels wait for the
host. The largest is the line that a row is measured by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import measure, subjects, variants
from benchmarks.kept_bytes import targets_of
from benchmarks.report import Options, Table, answer


@dataclass(frozen=True)
class Card:
    """What a GPU does in a second, in bfloat16."""

    flops: float
    bytes: float
    launches: float = 1 / 5e-6
    """Kernels that a host launches; Python takes longer."""


CARDS = {"H100": Card(989e12, 3.35e12), "H200": Card(989e12, 4.8e12)}
REACHED = 0.6
"""The share of the peak that products of a frozen layer reach."""
NEAR = 0.05
"""What is no further above a line meets it."""
KERNELS = 6
"""What a low-rank change cannot be computed without, beside a layer, forward and backward."""
_ELEMENT = 2


@dataclass(frozen=True)
class Lines:
    """How long a step with LoRA takes at least, as a multiple of the frozen model's."""

    arithmetic: float
    traffic: float | None = None
    launches: float | None = None

    @property
    def largest(self) -> tuple[float, str]:
        """The line that decides, and its name. On a GPU that of traffic has the products' time in it."""
        known = {name: value for name, value in vars(self).items() if value is not None}
        if self.traffic is not None:
            del known["arithmetic"]
        name = max(known, key=lambda name: known[name])
        return known[name], name


def lines(shape: subjects.Shape, card: Card | None = None, fused: bool = False) -> Lines:
    """Return the lines of a model, on a CPU if no card is given.

    Args:
        shape: The model and its input.
        card: The GPU.
        fused: Whether what adapters add to a layer's output and gradient is added by the layer's own kernels.
    """
    subject, hidden = shape.build("meta"), shape.inputs("meta")
    bound, ours = (variants.present(name)[0].build(subject) for name in (variants.BOUND, variants.OURS))
    plain, more = (flops(lambda model=model: measure.backward(model(hidden))) for model in (bound, ours))
    if card is None:
        return Lines(more / plain)
    hidden.grad = None
    kernels = sum(map(len, measure.operators(bound, hidden)))
    with_adapters = kernels + KERNELS * sum(1 for _ in targets_of(bound))
    computing, launching = plain / (REACHED * card.flops), kernels / card.launches
    moved = _ELEMENT * shape.batch * shape.tokens * elements(bound, hidden, fused)
    # They come on top of each other: small products read more than they compute.
    traffic = (more - plain) / (REACHED * card.flops) + moved / card.bytes
    return Lines(
        more / plain,
        1 + traffic / max(computing, launching),
        max(computing, with_adapters / card.launches) / max(computing, launching),
    )


def flops(run: Callable[[], object]) -> int:
    """Return the floating-point operations of the products in ``run``."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def elements(bound: nn.Module, hidden: object, fused: bool) -> int:
    """Return how many elements for each token adapters move beside all layers.

    x is read forward and backward, and dX read and written, once for layers that share an input; y is read and written
    and dY read twice. With fused kernels x is read twice and dY once.
    """
    inputs: dict[int, int] = {}
    outputs = 0

    def see(module: nn.Linear, args: tuple[object, ...]) -> None:
        nonlocal outputs
        inputs[id(args[0])] = module.in_features
        kept.append(args[0])
        outputs += module.out_features

    kept: list[object] = []
    handles = [module.register_forward_pre_hook(see) for module in targets_of(bound)]
    bound(hidden)
    for handle in handles:
        handle.remove()
    return sum(inputs.values()) * (2 if fused else 4) + outputs * (1 if fused else 4)


def main(options: Options) -> list[Table]:
    """Work the lines out."""
    columns = ["model", "device", "arithmetic", "traffic", "traffic, fused", "launches", "decides"]
    table = Table("bounds", "LoRA of rank 8 on all linear layers, at least, as a multiple of the frozen bound", columns)
    for device in ("cpu", "cuda"):
        for name, shape in subjects.shapes(options.quick, device).items():
            for card in ("CPU",) if device == "cpu" else CARDS:
                found = lines(shape, CARDS.get(card))
                fused = lines(shape, CARDS[card], fused=True).traffic if card in CARDS else None
                values = (found.arithmetic, found.traffic, fused, found.launches)
                cells = ["-" if value is None else f"{value:.3f}" for value in values]
                table.rows.append([name, card, *cells, found.largest[1]])
    table.notes.append(
        "Counted and computed, the same on every machine. Frozen products at 60 % of the card's dense peak, full "
        "bandwidth, a kernel in 5 μs; where launches decide, the host's Python takes longer than that."
    )
    return [table]


def at_least(shape: subjects.Shape, device: str) -> tuple[float, str]:
    """Return the line that decides on ``device``, the name of a GPU or a CPU, and its name."""
    return lines(shape, next((card for name, card in CARDS.items() if name in device), None)).largest


def beside(line: tuple[float, str], step: measure.Spread) -> str:
    """Return a line as a table shows it, with whether a step, as a multiple of the frozen bound, meets it."""
    value, name = line
    met = "met" if step.median <= (1 + NEAR) * value else f"{step.median / value:.2f} times it"
    return f"{value:.3f} ({name}): {met}"


if __name__ == "__main__":
    answer(main)
