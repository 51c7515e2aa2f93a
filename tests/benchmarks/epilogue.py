"""A product whose kernel adds a low-rank product before it writes: X Y + s · H Z. It needs Triton."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_INNER = 16
"""The fewest columns of H that a tensor core multiplies; more are read as zeros."""


_TILES = ((128, 256, 64, 3, 8), (128, 128, 64, 4, 4), (64, 128, 32, 4, 4), (64, 64, 32, 4, 4))
"""Rows, columns and depth of a tile, stages of its pipeline, warps."""


@triton.autotune(
    [triton.Config({"M": m, "N": n, "K": k, "GROUP": 8}, num_stages=s, num_warps=w) for m, n, k, s, w in _TILES],
    # Forward Y is laid out as Wᵀ, backward as W.
    key=["rows", "columns", "inner", "y_row"],
)
@triton.jit
def _kernel(
    x, y, h, z, out, rows, columns, inner, rank, scale,
    x_row, x_column, y_row, y_column, h_row, h_column, z_row, z_column, out_row, out_column,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    # Tiles of a few rows of tiles run side by side, so that they find what they read in the cache.
    tile, down, across = tl.program_id(0), tl.cdiv(rows, M), tl.cdiv(columns, N)
    first = tile // (GROUP * across) * GROUP
    height = min(down - first, GROUP)
    at_row = first + tile % (GROUP * across) % height
    at_column = tile % (GROUP * across) // height
    row, column, k = at_row * M + tl.arange(0, M), at_column * N + tl.arange(0, N), tl.arange(0, K)
    known_row, known_column = row[:, None] < rows, column[None, :] < columns
    total = tl.zeros((M, N), dtype=tl.float32)
    for start in range(0, inner, K):
        at = start + k
        left = tl.load(x + row[:, None] * x_row + at[None, :] * x_column, known_row & (at[None, :] < inner), 0.0)
        right = tl.load(y + at[:, None] * y_row + column[None, :] * y_column, (at[:, None] < inner) & known_column, 0.0)
        total = tl.dot(left, right, total)
    r = tl.arange(0, R)
    left = tl.load(h + row[:, None] * h_row + r[None, :] * h_column, known_row & (r[None, :] < rank), 0.0)
    right = tl.load(z + r[:, None] * z_row + column[None, :] * z_column, (r[:, None] < rank) & known_column, 0.0)
    total += scale * tl.dot(left, right)
    place = out + row[:, None] * out_row + column[None, :] * out_column
    tl.store(place, total.to(out.dtype.element_ty), known_row & known_column)


def product_and(x: Tensor, y: Tensor, h: Tensor, z: Tensor, scale: float) -> Tensor:
    """Return X Y + s · H Z.

    Args:
        x: ``[rows, inner]``.
        y: ``[inner, columns]``.
        h: ``[rows, r]``.
        z: ``[r, columns]``.
        scale: s.
    """
    (rows, inner), columns, rank = x.shape, y.shape[1], h.shape[1]
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)

    def tiles(meta: dict[str, Any]) -> tuple[int]:
        return (triton.cdiv(rows, meta["M"]) * triton.cdiv(columns, meta["N"]),)

    strides = [stride for tensor in (x, y, h, z, out) for stride in tensor.stride()]
    padded = max(_INNER, triton.next_power_of_2(rank))
    _kernel[tiles](x, y, h, z, out, rows, columns, inner, rank, scale, *strides, R=padded)
    return out
