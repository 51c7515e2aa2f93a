"""Safetensors files written tensor by tensor: of a file no more than one tensor is in memory.

The layout is eight bytes with the length of a header, the header in JSON, and the tensors' bytes one after another.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

Kind = tuple[torch.dtype, tuple[int, ...]]


def can_stream(dtype: torch.dtype) -> bool:
    """Whether :func:`stream_tensors` writes tensors of ``dtype``."""
    return dtype in _DTYPES and sys.byteorder == "little"


def stream_tensors(path: Path, kinds: Mapping[str, Kind], values: Iterable[tuple[str, Tensor]]) -> None:
    """Write a safetensors file.

    Args:
        path: The file.
        kinds: Dtype and shape of every tensor, in the order of ``values``.
        values: The tensors by name, which are asked for one by one.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in kinds.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, tensor in values:
            assert (tensor.dtype, tuple(tensor.shape)) == kinds[name]
            file.write(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
