"""Plots of changes in the forms of the LoRA paper. They need matplotlib, which is no dependency of the package."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_peft.errors import PEFTError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def require_matplotlib() -> None:
    """Raise :class:`PEFTError` if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise PEFTError("Plots need matplotlib: pip install matplotlib.")


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, Any]:
    """Return an empty figure and its axes ``[rows, columns]``; no display is needed."""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def similarity_plot(grids: Mapping[str, Tensor]) -> Figure:
    """Draw heat maps of φ(i, j), as in figures 3 and 4 of the paper.

    Args:
        grids: By title, what :func:`~lightning_peft.analysis.similarity` returned, ``[p, q]``.

    Raises:
        PEFTError: matplotlib is not installed.
    """
    figure, axes = _figure(1, len(grids), 4, 3.5)
    image = None
    for (title, grid), axis in zip(grids.items(), axes[0], strict=True):
        edges = (0.5, grid.shape[1] + 0.5, grid.shape[0] + 0.5, 0.5)
        image = axis.imshow(grid.cpu().numpy(), vmin=0, vmax=1, aspect="auto", extent=edges)
        axis.set(title=title, xlabel="j", ylabel="i")
    if image is not None:
        figure.colorbar(image, ax=axes, label="φ(i, j)")
    return figure


def spectrum_plot(spectra: Mapping[str, Tensor]) -> Figure:
    """Draw the singular values of changes, each divided by the largest.

    Args:
        spectra: By label, singular values ``[k]`` in descending order.

    Raises:
        PEFTError: matplotlib is not installed.
    """
    figure, axes = _figure(1, 1, 6, 4)
    axis = axes[0, 0]
    for label, values in spectra.items():
        axis.plot(range(1, len(values) + 1), (values / values.max()).cpu().numpy(), label=label)
    axis.set(xlabel="i", ylabel="σᵢ / σ₁", yscale="log")
    if len(spectra) <= 12:
        axis.legend(fontsize="small")
    return figure


def layer_plot(values: Mapping[str, float], label: str) -> Figure:
    """Draw a figure of each module as a heat map: a row for each kind of module, a column for each block.

    Args:
        values: By the module's name, such as ``model.layers.3.self_attn.q_proj``. The last number in it is the block.
        label: What the figures are.

    Raises:
        PEFTError: matplotlib is not installed.
    """
    places = {name: _place(name) for name in values}
    kinds = list(dict.fromkeys(kind for kind, _ in places.values()))
    blocks = sorted({block for _, block in places.values()})
    table = torch.full((len(kinds), len(blocks)), float("nan"))
    for name, (kind, block) in places.items():
        table[kinds.index(kind), blocks.index(block)] = values[name]
    figure, axes = _figure(1, 1, 3 + 0.3 * len(blocks), 1.5 + 0.3 * len(kinds))
    axis = axes[0, 0]
    image = axis.imshow(table.numpy(), aspect="auto")
    axis.set_xticks(range(len(blocks)), blocks)
    axis.set_yticks(range(len(kinds)), kinds)
    axis.set_xlabel("block")
    figure.colorbar(image, ax=axis, label=label)
    return figure


def _place(name: str) -> tuple[str, int]:
    """Return what stands behind the last number in a module's name, and that number; 0 if there is none."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    if not numbers or numbers[-1] == len(parts) - 1:
        return name, 0
    return ".".join(parts[numbers[-1] + 1 :]), int(parts[numbers[-1]])
