"""Fold adapters into the weights and back: same outputs, no adapter left in the forward pass."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from lightning_peft.core.adapter import Adapter, Slot
from lightning_peft.core.refusals import refuse_stand_in
from lightning_peft.core.registry import Registry, note_unloaded, refuse_shared, required
from lightning_peft.core.to_the_end import to_the_end
from lightning_peft.core.view import ModelView
from lightning_peft.errors import NotFiniteError, PEFTError
from lightning_peft.operations.by_hand import watch
from lightning_peft.operations.fold import check_fold, fold_into, restore
from lightning_peft.operations.inject import remove
from lightning_peft.operations.mergeable import can_merge, not_unloaded, refuse_pieces, refuse_ties, weights_of, why_not
from lightning_peft.operations.shards import in_pieces, resharded
from lightning_peft.structure.inner_models import transformers_models
from lightning_peft.tensors.packed import forget_quantiser, holds_codes, is_packed, is_packed_linear, unpack
from lightning_peft.tensors.sharding import whole

_Host = tuple[str, nn.Module, Slot, Adapter]


@dataclass(frozen=True)
class MergeReport:
    """What a merge did. A loss is the norm of what rounding took, divided by the norm of the adapter's change."""

    merged: int
    """Number of modules whose weight now holds the adapter's effect."""
    mean_loss: float
    largest_loss: float
    worst: str
    """The module with the largest loss."""
    kept: tuple[str, ...]
    """Modules whose adapters cannot be merged: they stay attached."""
    dequantized: int = 0
    """Number of quantised layers that are float ones now."""

    @classmethod
    def of(cls, merged: int, losses: Mapping[str, float], kept: tuple[str, ...] = (), unpacked: int = 0) -> MergeReport:
        """Return the report for ``losses`` by module."""
        worst = max(losses, key=lambda name: losses[name], default="")
        mean = sum(losses.values()) / len(losses) if losses else 0.0
        return cls(merged, mean, losses.get(worst, 0.0), worst, kept, unpacked)

    def __str__(self) -> str:
        if not self.merged:
            kept = f": {len(self.kept)} adapters cannot be merged and stay attached" if self.kept else ""
            return f"Nothing to merge{kept or ': what was trained is in the weights'}."
        text = f"Made {self.dequantized} quantised layers float ones. " if self.dequantized else ""
        text += (
            f"Merged {self.merged} adapters into the weights; rounding took {self.mean_loss:.2%} of their effect on "
            f"average, {self.largest_loss:.2%} at most ({self.worst or 'none'})."
        )
        return text + (f" {len(self.kept)} adapters cannot be merged and stay attached." if self.kept else "")


@torch.no_grad()
def merge(model: nn.Module, *, unload: bool = False, dequantize: bool = False) -> MergeReport:
    """Fold the active adapters into the weights they adapt, computed in at least float32.

    A weight that is tied to another module's is untied first (its twin keeps the old values). Merging a merged model
    does nothing. Until :func:`unmerge`, a copy of every adapted weight is kept in host memory. A model that is in
    pieces on several processes is merged piece by piece: each of them has to call this, and the ones below.

    Args:
        model: A model with adapters.
        unload: Also remove the adapters for good, and keep no copies: the model is a plain one with the adapters'
            effect in its weights.
        dequantize: First make every quantised linear layer of the model a float one, with the weight that it computes
            with, in the dtype of the model's other weights. It then takes the memory of one. The layers stay float,
            also after :func:`unmerge`.

    Raises:
        PEFTError: There are no adapters; one holds NaN or infinity, or merged would make a weight hold it; ``unload``
            and one cannot be merged; or a weight that would have to be untied is in pieces. No weight has changed; nor
            has one if the merge is interrupted, but with ``unload``, where the next call finishes what was begun.
    """
    view = resharded(model)
    roots = required(view)
    refuse_stand_in(view, "merge")
    if unload:
        refuse_shared(view)
    unpacked = _unpack(view) if dequantize else 0
    active = [(n, h, s, a) for n, h, s in view.slots if isinstance(a := s.active_adapter, Adapter)]
    todo = [found for found in active if can_merge(found[1], found[3])]
    kept = tuple(name for name, _, slot, _ in active if not any(slot is found[2] for found in todo))
    if unload and kept:
        raise PEFTError(next(not_unloaded(n, host, adapter) for n, host, _, adapter in active if n == kept[0]))
    _tell_late(active, kept)
    _refuse_non_finite(todo)
    if any(in_pieces(host) for _, host, _, _ in todo):
        refuse_ties(view)
    refuse_pieces((name, host) for name, host, _, _ in todo)
    new = [found for found in todo if found[2].merged is None]
    if unload:
        # Without copies there is no way back: what each weight will be is worked out beforehand.
        for name, host, _, adapter in new:
            check_fold(name, host, adapter)
    try:
        losses = _fold_all(view, new, keep=not unload)
    except BaseException:
        # For good, what is merged stays so: each host is merged or not, and the next call goes on.
        if not unload:
            to_the_end(partial(_restore, [(host, slot) for _, host, slot, _ in new]))
        raise
    if unload:
        to_the_end(partial(_remove, view, roots, [host for _, host, _, _ in todo]))
    return MergeReport.of(len(todo), losses, kept, unpacked)


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Give every merged weight its old values back, bit for bit; the adapters run again. Does nothing if not merged.

    Raises:
        PEFTError: There are no adapters.
    """
    view = resharded(model)
    required(view)
    restore_weights(view)


@torch.no_grad()
def restore_weights(model: ModelView) -> None:
    """Give every merged weight its old values back, if there are some."""
    to_the_end(partial(_restore, [(host, slot) for _, host, slot in model.slots]))


def _restore(hosts: Iterable[tuple[nn.Module, Slot]]) -> None:
    for host, slot in hosts:
        if slot.merged is None:
            continue
        restore(host, slot.merged)
        for config in slot.merged["tied"]:
            config.tie_word_embeddings = True
        slot.merged = None


def _unpack(model: ModelView) -> int:
    """Make the packed linear layers of ``model`` float ones, and return how many there were."""
    packed = [module for _, module in model.walked if is_packed_linear(module)]
    _refuse_non_finite([(n, h, s, a) for n, h, s in model.slots if (a := s.active_adapter) is not None])
    others = (p for name, p in model.parameters.items() if p.is_floating_point() and not holds_codes(p))
    dtype = next((parameter.dtype for parameter in others), torch.get_default_dtype())
    for module in packed:
        unpack(module, dtype)
    for prefix, root, registry in required(model):
        watch(root, registry, [host for _, host, _ in model.part(prefix).slots])
    for name in transformers_models(model) if packed else ():
        forget_quantiser(model.modules[name])
    return len(packed)


def _remove(view: ModelView, roots: Sequence[tuple[str, nn.Module, Registry]], hosts: Iterable[nn.Module]) -> None:
    for host in hosts:
        note_unloaded(host)  # which may become a part of another model
    for prefix, root, _ in reversed(roots):
        note_unloaded(root)
        remove(view.part(prefix))


def is_merged(model: nn.Module) -> bool:
    """Whether adapters are merged into the weights of ``model``."""
    return any(slot.merged is not None for _, _, slot in ModelView(model).slots)


def _tell_late(active: Sequence[_Host], kept: Collection[str]) -> None:
    """Say why adapters that could be merged when they were injected cannot be now."""
    for name, host, _, adapter in active:
        if name in kept and adapter.mergeable and not is_packed(host) and (reason := why_not(host, adapter)):
            warnings.warn(f"The adapter of {name!r} cannot be merged and stays attached: {reason}.", stacklevel=3)


def _fold_all(model: ModelView, hosts: Sequence[_Host], keep: bool) -> dict[str, float]:
    """Merge ``hosts`` and return what rounding took, by name."""
    shared = model.shared
    losses: dict[str, float] = {}
    written: dict[int, dict[str, Any]] = {}
    for name, host, slot, adapter in hosts:
        weights = weights_of(host, adapter)
        if adapter.follows_ties and id(weights[0]) in written:
            slot.merged = written[id(weights[0])]
            continue
        untied = set() if adapter.follows_ties else shared & {id(weight) for weight in weights}
        note = partial(_note, slot, _tied_configs(model) if untied else [])
        # A parameter that comes new into a sharded module belongs to no shard.
        bias = set() if in_pieces(host) else shared & {id(host._parameters.get("bias"))}
        losses[name] = fold_into(name, host, adapter, untied | bias, keep, note)
        assert slot.merged is not None
        written[id(weights[0])] = slot.merged
    return losses


def _note(slot: Slot, tied: list[Any], backup: dict[str, Any]) -> None:
    """Note that the adapter of ``slot`` is being merged, and tell the configurations ``tied`` that weights are not."""
    slot.merged = {**backup, "tied": tied}
    for config in tied:
        config.tie_word_embeddings = False


def _refuse_non_finite(hosts: Sequence[_Host]) -> None:
    for name, _, _, adapter in hosts:
        for parameter_name, parameter in adapter.named_parameters():
            if not torch.isfinite(whole(parameter)).all():
                raise NotFiniteError(
                    f"The adapter of {name!r} holds NaN or infinity in {parameter_name}: merging it would destroy the "
                    "weight. Load an earlier checkpoint."
                )


def _tied_configs(model: ModelView) -> list[Any]:
    """Return what says of transformers models that head and embedding are one: saving would keep only one of them."""
    return [
        config
        for name in transformers_models(model)
        for _, part in model.part(name).walked
        if getattr(config := cast(Any, part.__dict__.get("config")), "tie_word_embeddings", False) is True
    ]
