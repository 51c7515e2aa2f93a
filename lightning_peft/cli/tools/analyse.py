"""``lightning-peft analyse``: what an adapter has done to each weight, and what two have in common."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from json import dumps
from pathlib import Path
from typing import Any

from lightning_peft.analysis import (
    WeightChange,
    amplification,
    changes,
    random_similarity,
    read_changes,
    share_initial_a,
    similarity,
)
from lightning_peft.analysis.plots import layer_plot, similarity_plot, spectrum_plot
from lightning_peft.cli.tools.inspect import model_class
from lightning_peft.cli.tools.merge import mapped
from lightning_peft.errors import PEFTError, listed
from lightning_peft.storage.loading import load_adapter
from lightning_peft.tasks.pretrained import load_model

_Row = dict[str, Any]
_HEADINGS = {
    "module": "module",
    "rank": "rank",
    "norm": "|dW|",
    "relative_norm": "|dW|/|W|",
    "stable_rank": "stable rank",
    "effective_rank": "eff. rank",
    "in_change": "|U'WV|",
    "in_weight": "of W",
    "in_random": "random",
    "factor": "factor",
    "in_top": "in top 10%",
    "similarity": "phi",
    "random_similarity": "random",
    "similarity_a": "phi of A",
}
_KEPT = 6
"""Of so many modules a plot shows the spectra or similarities: those of the largest changes."""


def analyse(
    adapter: str, other: str | None = None, base: str | None = None, plot: str | None = None, json: bool = False
) -> None:
    """Show what an adapter has done to each weight: how large its change is, of which rank, and in which directions.

    With its base model also how the change stands to the weight (the LoRA paper's table 7: ‖UᵀWV‖ in the directions of
    the change, in W's own, in random ones, and the amplification factor). With another adapter of the same modules
    also how similar their directions are (its equation 4, beside the value of random directions): of the change's right
    directions, and of A.

    Args:
        adapter: An adapter directory, of this package or of Hugging Face PEFT. One of another method than LoRA needs
            its base.
        other: Another one, to compare with.
        base: The base model: a directory, a name on the Hugging Face hub, or package:NAME.
        plot: A directory for plots (PNG): spectra, sizes and factors by layer, similarities. They need matplotlib.
        json: Print a JSON object in a line for each module, for programs.

    Raises:
        PEFTError: One of them cannot be read, they adapt other modules, or the method is no change of weights.
    """
    found = _read(adapter, base)
    second = _read(other, base) if other is not None else {}
    if other is not None and not (shared := found.keys() & second.keys()):
        raise PEFTError(f"{adapter} adapts {listed(found)}; {other} adapts {listed(second)}: no module is the same.")
    if other is not None and found.keys() != second.keys():
        alone = sorted(found.keys() ^ second.keys())
        warnings.warn(f"Adapted by one of the two alone, and not compared: {listed(alone)}.", stacklevel=2)
        found = {name: change for name, change in found.items() if name in shared}
    if second and any(share_initial_a(found[name], second[name]) for name in found):
        warnings.warn(
            "The two adapters began with the same A, as with one seed: similarities of A, and to some degree those of "
            "right directions, tell of that. Compare runs of different seeds.",
            stacklevel=2,
        )
    rows = [_row(name, change, second.get(name)) for name, change in found.items()]
    _print(rows, json)
    if plot is not None:
        _draw(Path(plot), found, second, rows, quiet=json)


def _read(adapter: str, base: str | None) -> dict[str, WeightChange]:
    if base is None:
        return read_changes(adapter)
    kind = model_class(Path(adapter), base)
    model = mapped(base, kind) or load_model(base, kind)
    load_adapter(model, adapter)
    return dict(changes(model))


def _row(name: str, change: WeightChange, other: WeightChange | None) -> _Row:
    rank = change.rank
    row: _Row = {"module": name, "rank": rank, "norm": change.norm}
    if change.weight is not None:
        row["relative_norm"] = change.relative_norm
    row |= {"stable_rank": change.stable_rank, "effective_rank": change.effective_rank}
    if change.weight is not None and rank:
        measured = amplification(change)
        keys = ("in_change", "in_weight", "in_random", "factor", "in_top")
        row |= {key: getattr(measured, key) for key in keys}
    if other is not None:
        grid = similarity(change, other)
        row["similarity"] = float(grid[-1, -1]) if grid.numel() else 0.0
        row["random_similarity"] = random_similarity(len(grid), grid.shape[1], change.right.shape[1])
        if change.lora_A is not None and other.lora_A is not None:
            row["similarity_a"] = float(similarity(change, other, "A")[-1, -1])
    return row


def _print(rows: list[_Row], json: bool) -> None:
    if json:
        for row in rows:
            print(dumps(row))
        return
    keys = [key for key in _HEADINGS if any(key in row for row in rows)]
    cells = [[_HEADINGS[key] for key in keys], *([_cell(row.get(key)) for key in keys] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        first, *others = line
        print("  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]))


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _draw(
    folder: Path, found: dict[str, WeightChange], second: dict[str, WeightChange], rows: list[_Row], quiet: bool
) -> None:
    for name, figure in _figures(found, second, rows):
        path = folder / f"{name}.png"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(path)
        except OSError as error:
            raise PEFTError(f"{path} cannot be written: {error.strerror}. Name another directory by --plot.") from error
        if not quiet:
            print(f"{path} written")


def _figures(
    found: dict[str, WeightChange], second: dict[str, WeightChange], rows: list[_Row]
) -> Iterator[tuple[str, Any]]:
    largest = sorted(found, key=lambda name: -found[name].norm)[:_KEPT]
    yield "spectra", spectrum_plot({name: found[name].spectrum for name in largest if found[name].norm})
    for key in ("norm", "relative_norm", "factor"):
        if values := {row["module"]: row[key] for row in rows if row.get(key) is not None}:
            yield key, layer_plot(values, _HEADINGS[key])
    if second:
        yield "similarities", similarity_plot({name: similarity(found[name], second[name]) for name in largest})
