"""Several adapters in one batch: each row has its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_peft.adapters.bottleneck.bottleneck import Bottleneck
from lightning_peft.adapters.bottleneck.rows import BottleneckRows
from lightning_peft.adapters.low_rank.linear import LoRAAdapter
from lightning_peft.adapters.low_rank.rows import LowRankRows
from lightning_peft.adapters.rows import GroupedRows
from lightning_peft.core.adapter import Adapter, Slot
from lightning_peft.core.refusals import refuse_merged
from lightning_peft.core.registry import required
from lightning_peft.core.stand_in import StandIns, stand_in
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.operations.shards import resharded


@contextmanager
def adapter_names(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Within it, row i of a batch goes through the adapter ``names[i]``, whichever is active.

    This holds for the calling thread or task, as every context variable does: others call the model as they like.
    Gradients reach each of these adapters whose parameters require them. A backward pass that recomputes activations
    (gradient checkpointing) belongs inside the context too. Without gradients the adapters' matrices are stacked once:
    what is written to them through ``.data`` within the context is not seen in it.

    Args:
        model: A model with adapters, not merged, in which every adapted module is given one row for each sample.
        names: For each row of the batch the name of an adapter, or ``""`` for the base model. With beam search
            each name is repeated ``num_beams`` times.

    Raises:
        PEFTError: There is no such adapter; the model is merged, has modules trained whole, or adapters in pieces on
            several processes; a method does not act on rows by themselves. Within the context: a module is given
            another number of rows.
    """
    view = resharded(model)
    names = _checked(view, names)
    distinct = list(dict.fromkeys(names))
    rows = torch.tensor([distinct.index(name) for name in names])
    on_device: dict[torch.device, Tensor] = {}
    stand_ins: list[tuple[StandIns, Adapter | None]] = []
    for name, host, slot in view.slots:
        adapters = [_adapter(name, slot, wanted) for wanted in distinct]
        device = next(host.parameters()).device
        if device not in on_device:
            on_device[device] = rows.to(device)
        stand_ins.append((slot.stand_ins, _for_rows(name, adapters, on_device[device])))
    _refuse_sequence_first(view)
    with stand_in(stand_ins):
        yield


def _checked(model: ModelView, names: Sequence[str]) -> list[str]:
    found = required(model)
    refuse_merged(model, "give each row an adapter of its own")
    if isinstance(names, str) or not all(isinstance(name, str) for name in names) or not names:
        raise PEFTError(
            f"adapter_names: {names!r} was given; a list with the name of an adapter for each row of the batch was "
            "expected, for example ['a', '', 'b']."
        )
    known = sorted({adapter for _, _, registry in found for adapter in registry.methods})
    if unknown := [name for name in names if name and name not in known]:
        raise PEFTError(
            f"There is no adapter {unknown[0]!r}. Adapters: {', '.join(known)}; '' stands for the base model."
        )
    if "" in names and (trained := [name for _, _, registry in found for name in registry.whole]):
        raise PEFTError(
            f"adapter_names: '' was given, but {trained[0]!r} is trained itself, so that the base model is not there "
            "for single rows. Use disable(model) for the whole batch."
        )
    return list(names)


def _adapter(host: str, slot: Slot, name: str) -> Adapter | None:
    """Return the adapter ``name`` of a host, if it has one.

    Raises:
        PEFTError: It cannot have rows of its own.
    """
    adapter = slot._modules.get(name)
    if not isinstance(adapter, Adapter):
        return None
    if not adapter.by_row:
        raise PEFTError(
            f"adapter_names: {name!r} is a {type(adapter).__name__}, which does not act on the rows of a batch by "
            "themselves. Run its rows as a batch of their own, after set_adapter."
        )
    if "experts" in host.split("."):
        raise PEFTError(
            f"adapter_names: {name!r} adapts {host!r}, an expert: it is given tokens from any rows of the batch. Adapt "
            "other modules, or run the rows of each adapter as a batch of their own, after set_adapter."
        )
    if any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in adapter.parameters()):
        raise PEFTError(f"adapter_names: {name!r} is in pieces on several processes. Load it in one process.")
    return adapter


def _for_rows(host: str, adapters: Sequence[Adapter | None], rows: Tensor) -> Adapter | None:
    if all(adapter is None for adapter in adapters):
        return None
    low_rank = [a for a in adapters if a is None or type(a) is LoRAAdapter]
    if len(low_rank) == len(adapters):
        return LowRankRows(host, low_rank, rows)
    bottlenecks = [a for a in adapters if a is None or isinstance(a, Bottleneck)]
    if len(bottlenecks) == len(adapters) and BottleneckRows.serves(bottlenecks):
        return BottleneckRows(host, bottlenecks, rows)
    return GroupedRows(host, adapters, rows)


def _refuse_sequence_first(model: ModelView) -> None:
    for name, module in model.modules.items():
        if isinstance(module, nn.MultiheadAttention) and not module.batch_first:
            raise PEFTError(
                f"adapter_names: {name!r} works on tensors [tokens, batch, …]; [batch, tokens, …] was expected. Build "
                "the model with batch_first=True."
            )
