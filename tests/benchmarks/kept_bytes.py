"""How many bytes are kept for the backward pass? Deterministic."""

from __future__ import annotations

from torch import Tensor, nn

from benchmarks import measure, subjects, variants
from benchmarks.report import MB, Options, Table, answer


def kept(model: nn.Module, hidden: Tensor) -> int:
    """Return the bytes of distinct storages, parameters left out, that a forward pass keeps."""
    return sum(measure.saved_storages(lambda: model(hidden), model)[0].values())


def floor(model: nn.Module, hidden: Tensor, targets: list[nn.Module]) -> int:
    """Return what the frozen model keeps, and one copy of each distinct input of ``targets`` that is not among that.

    Both are taken from one forward pass of the model without adapters.
    """
    inputs: dict[int, int] = {}
    alive = []

    def run() -> Tensor:
        found, kept_alive = measure.input_storages(lambda: model(hidden), targets)
        inputs.update(found)
        alive.append(kept_alive)
        return kept_alive[-1]

    saved, _ = measure.saved_storages(run, model)
    return sum({**inputs, **saved}.values())


def targets_of(subject: subjects.Subject) -> list[nn.Module]:
    """Return the linear layers that are adapted."""
    return [
        module
        for name, module in subject.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in subject.targets
    ]


def reduced_bytes(hidden: Tensor, count: int) -> int:
    """Return the bytes of x Aᵀ of ``count`` layers, for variants that keep it instead of computing it twice."""
    return hidden[..., 0].numel() * variants.RANK * hidden.element_size() * count


def main(options: Options) -> list[Table]:
    """Count bytes kept for the backward pass."""
    columns = ["model", "variant", "dropout", "MB", "/ frozen bound", "MB above the floor"]
    table = Table("kept_bytes", "Bytes kept for the backward pass", columns)
    for name, shape in subjects.shapes(options.quick).items():
        if "70B" in name:
            continue
        subject, hidden = shape.build(), shape.inputs()
        bound_model = variants.present(variants.BOUND)[0].build(subject)
        bound, targets = kept(bound_model, hidden), targets_of(bound_model)
        lowest = floor(bound_model, hidden, targets)
        table.rows.append([name, "floor: the bound and every distinct input", "-", lowest / MB, lowest / bound, "-"])
        for variant in variants.present():
            for dropout in variant.dropouts:
                count = kept(variant.build(subject, dropout), hidden)
                above = (count - lowest) / MB if dropout or variant.name not in (variants.BOUND, variants.FULL) else "-"
                table.rows.append([name, variant.name, f"{dropout:g}", count / MB, count / bound, above])
        small = reduced_bytes(hidden, len(targets)) / MB
        table.notes.append(f"{name}: x Aᵀ of all layers together is {small:.2f} MB.")
    table.notes += variants.notes(options.device)
    return [table]


if __name__ == "__main__":
    answer(main)
