"""Adapters that treat each row of a batch differently: what stands in for a host's own within ``adapter_names``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapter import Adapter
from lightning_peft.calls import hidden_of, input_of, on_hidden, with_input
from lightning_peft.errors import PEFTError


class Rows(Adapter):
    """Base of these: some adapters of one host, and which of them each row has.

    Args:
        name: The host's name, for errors.
        adapters: The adapters; ``None`` for the base model.
        rows: Position in ``adapters`` for each row, int64 ``[rows]``.
    """

    def __init__(self, name: str, adapters: Sequence[Adapter | None], rows: Tensor) -> None:
        super().__init__()
        # In a tuple they are no children: their hosts' slots have them already.
        self.adapters, self.rows, self._name = tuple(adapters), rows, name

    def checked(self, tensor: Tensor) -> Tensor:
        """Return ``tensor``.

        Raises:
            PEFTError: Its first dimension is not the batch.
        """
        if len(tensor) != len(self.rows):
            raise PEFTError(
                f"adapter_names: {len(self.rows)} names were given, but {self._name!r} works on a tensor of shape "
                f"{list(tensor.shape)}; one name for each of its {len(tensor)} rows was expected. If generate() makes "
                "several rows of each, by num_beams or num_return_sequences, repeat each name as often. A module that "
                "is given anything but one row for each sample cannot be adapted by row."
            )
        return tensor


class GroupedRows(Rows):
    """Adapters of any kind, one after another, each on its own rows."""

    def __init__(self, name: str, adapters: Sequence[Adapter | None], rows: Tensor) -> None:
        super().__init__(name, adapters, rows)
        self._groups = [(rows == position).nonzero().flatten() for position in range(len(adapters))]
        self._back = torch.cat(self._groups).argsort()

    def before(
        self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Let each adapter change its rows of the first argument."""
        x = self.checked(input_of(args, kwargs))

        def change(adapter: Adapter, rows: Tensor) -> Tensor:
            return input_of(*adapter.before(base, *with_input(args, kwargs, x[rows])))

        return with_input(args, kwargs, self._each(x, change))

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Let each adapter change its rows of the hidden state in ``output``."""
        x = self.checked(input_of(args, kwargs))

        def change(adapter: Adapter, rows: Tensor) -> Tensor:
            mine = on_hidden(output, lambda hidden: hidden[rows])
            return hidden_of(adapter(base, *with_input(args, kwargs, x[rows]), mine))

        return on_hidden(output, lambda hidden: self._each(self.checked(hidden), change))

    def _each(self, tensor: Tensor, change: Callable[[Adapter, Tensor], Tensor]) -> Tensor:
        """Return ``tensor``, changed in the rows that have an adapter."""
        pairs = zip(self.adapters, self._groups, strict=True)
        parts = [tensor[rows] if adapter is None else change(adapter, rows) for adapter, rows in pairs]
        return torch.cat(parts)[self._back]
