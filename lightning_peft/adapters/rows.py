"""Adapters that treat each row of a batch differently: what stands in for a host's own within ``adapter_names``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_peft.core.adapter import Adapter
from lightning_peft.core.calls import hidden_of, input_of, on_hidden, with_input
from lightning_peft.errors import PEFTError


class Rows(Adapter):
    """Base of these: some adapters of one host, and which of them each row has.

    Args:
        name: The host's name, for errors.
        adapters: The adapters, in the order in which rows first have them; ``None`` for the base model.
        rows: Position in ``adapters`` for each row, int64 ``[rows]``.
    """

    def __init__(self, name: str, adapters: Sequence[Adapter | None], rows: Tensor) -> None:
        super().__init__()
        # In a tuple they are no children: their hosts' slots have them already.
        self.adapters, self.rows, self._name = tuple(adapters), rows, name
        self._kept: tuple[Any, list[Tensor], list[Tensor]] | None = None

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

    def of_rows(self, stacks: Iterable[Tensor]) -> list[Tensor]:
        """Return stacks ``[adapters, …]`` as ``[rows, …]``."""
        one_each = len(self.rows) == len(self.adapters)
        return [stack if one_each else stack.index_select(0, self.rows) for stack in stacks]

    def kept(self, dtype: torch.dtype, parameters: Sequence[Tensor], stack: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Return what ``stack`` makes of ``parameters``, in ``dtype``; again only with gradients or other values."""
        # Tensors made in inference mode do not tell when they are changed.
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or any(p.is_inference() for p in parameters):
            return [made.to(dtype) for made in stack()]
        state = (dtype, [p._version for p in parameters], [p.data_ptr() for p in parameters])
        # Looked at once: a context that is handed to several threads is served by all of them.
        if (kept := self._kept) is None or kept[0] != state:
            # Their old memory is held, or other values might come to stand there and be taken for these.
            self._kept = kept = (state, [made.to(dtype) for made in stack()], [p.detach() for p in parameters])
        return kept[1]

    def dropped(self, x: Tensor, rates: Sequence[float]) -> Tensor:
        """Return x ``[rows, tokens, features]`` with dropout at each row's own rate; ``rates`` are the adapters'."""
        if not any(rates):
            return x
        keep = x.new_tensor([1 - rate for rate in rates])[self.rows, None, None]
        return x * torch.bernoulli(keep.expand_as(x)) / keep


class GroupedRows(Rows):
    """Adapters of any kind, one after another, each on its own rows."""

    def __init__(self, name: str, adapters: Sequence[Adapter | None], rows: Tensor) -> None:
        super().__init__(name, adapters, rows)
        self.groups = [(rows == position).nonzero().flatten() for position in range(len(adapters))]
        self._back = torch.cat(self.groups).argsort()

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
        pairs = zip(self.adapters, self.groups, strict=True)
        return self.joined([tensor[rows] if adapter is None else change(adapter, rows) for adapter, rows in pairs])

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the rows of all adapters, one part for each, in the order of the batch."""
        return torch.cat(list(parts))[self._back]


def padded(tensors: Sequence[Tensor]) -> Tensor:
    """Return ``tensors``, of one number of dimensions, in a stack, with zeros at the end of what is smaller."""
    shape = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
    same = [tensor if list(tensor.shape) == shape else _enlarged(tensor, shape) for tensor in tensors]
    return torch.stack(same)


def _enlarged(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    missing = [size - have for size, have in zip(shape, tensor.shape, strict=True)]
    return functional.pad(tensor, [end for size in reversed(missing) for end in (0, size)])
