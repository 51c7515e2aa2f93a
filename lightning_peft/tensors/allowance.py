"""A limit on the memory that is asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from lightning_peft.errors import PEFTError

_MAKERS = (torch.empty, torch.zeros, torch.ones)


class Allowance(TorchFunctionMode):
    """Within it, tensors of so many elements may be made, all together.

    Args:
        elements: How many.
        source: What names their sizes, for the error.
    """

    def __init__(self, elements: int, source: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._left, self._source = elements, source

    def __torch_function__(self, function: Any, kinds: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Count what ``function`` makes before it does."""
        kwargs = kwargs or {}
        if function in _MAKERS and str(kwargs.get("device")) != "meta":
            shape = args[0] if args and isinstance(args[0], Sequence) else kwargs.get("size", args)
            self._left -= math.prod(shape)
            if self._left < 0:
                raise PEFTError(
                    f"{self._source}: its configuration asks for adapters of the shape {list(shape)} and more, many "
                    "times what its tensors hold. It is damaged."
                )
        return function(*args, **kwargs)
