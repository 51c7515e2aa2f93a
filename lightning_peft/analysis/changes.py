"""The change of each weight that an adapter makes, in factors, with its size and its spectrum."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_peft.adapters.low_rank.embedding import EmbeddingLoRAAdapter
from lightning_peft.adapters.low_rank.linear import BiasedLoRAAdapter, LoRAAdapter
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.refusals import refuse_merged
from lightning_peft.core.registry import required
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError, listed
from lightning_peft.files.contents import read_tensors
from lightning_peft.formats.configuration import read_config
from lightning_peft.formats.content import TENSOR_FILE
from lightning_peft.formats.counterparts.lora import read_low_rank
from lightning_peft.operations.to_lora import change_of_weight
from lightning_peft.tensors.finite import not_finite
from lightning_peft.tensors.packed import is_packed
from lightning_peft.tensors.sharding import whole
from lightning_peft.tensors.weights import is_linear, read_matrix

_NO_SIZE = "its change has no size. Take an earlier checkpoint"

_IN_FACTORS = (LoRAAdapter, EmbeddingLoRAAdapter, BiasedLoRAAdapter)
"""Adapters whose change of the weight is their scale times B A."""


@dataclass(frozen=True, eq=False)
class WeightChange:
    """The change ΔW = ``left @ right`` of one weight. Nothing here makes a matrix as large as the weight of it.

    Args:
        left: ``[out, r]``, float64.
        right: ``[r, in]``, float64.
        lora_A: A ``[r, in]`` of a LoRA, without its scale.
        lora_B: B ``[out, r]`` of a LoRA, without its scale.
        weight: A copy of the weight ``[out, in]`` that is changed, if it is there.
    """

    left: Tensor
    right: Tensor
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    weight: Tensor | None = None

    @cached_property
    def singular(self) -> tuple[Tensor, Tensor, Tensor]:
        """U ``[out, k]``, the singular values ``[k]`` in descending order, and V ``[in, k]``; k is at most r."""
        out_basis, out_rest = torch.linalg.qr(self.left)
        in_basis, in_rest = torch.linalg.qr(self.right.T)
        u, values, v = torch.linalg.svd(out_rest @ in_rest.T, full_matrices=False)
        return out_basis @ u, values, in_basis @ v.T

    @property
    def spectrum(self) -> Tensor:
        """The singular values ``[k]`` of ΔW, float64, in descending order."""
        return self.singular[1]

    @property
    def rank(self) -> int:
        """How many singular values are more than what rounding makes of zero: σ₁ · ε · max(out, in), ε of float64."""
        rounding = torch.finfo(torch.float64).eps * max(self.left.shape[0], self.right.shape[1])
        return int((self.spectrum > self.spectrum[:1] * rounding).sum())

    @property
    def norm(self) -> float:
        """‖ΔW‖, the Frobenius norm."""
        return float(torch.linalg.vector_norm(self.spectrum))

    @property
    def relative_norm(self) -> float | None:
        """‖ΔW‖ / ‖W‖, if the weight is there."""
        if self.weight is None:
            return None
        norm = float(torch.linalg.vector_norm(self.weight.double()))
        return self.norm / norm if norm else float("inf")

    @property
    def stable_rank(self) -> float:
        """‖ΔW‖² / σ₁² (Rudelson and Vershynin, 2007, section 1): 0 for no change, k for k equal singular values."""
        return float((self.spectrum / self.spectrum[0]).square().sum()) if self.norm else 0.0

    @property
    def effective_rank(self) -> float:
        """E to the entropy of σᵢ / Σσ (Roy and Vetterli, 2007, section 2): 0 for no change."""
        if not self.norm:
            return 0.0
        shares = self.spectrum / self.spectrum.sum()
        return float(torch.special.entr(shares).sum().exp())


@torch.no_grad()
def changes(model: nn.Module, name: str | None = None, *, weights: bool = True) -> Iterator[tuple[str, WeightChange]]:
    """Yield the change of every weight that an adapter of ``model`` makes, with the module's name.

    A LoRA's comes in its factors. That of another method is worked out as a matrix as large as the weight, one module
    at a time: go through them one by one where the model is large.

    Args:
        model: A model with adapters that change weights, whole on this process, and not merged.
        name: The adapter's; the active one by default.
        weights: Whether to copy the weights beside their changes.

    Raises:
        PEFTError: There is no such adapter, it is merged, or it does not change weights alone.
    """
    view = ModelView(model)
    parts = required(view)
    refuse_merged(view, "look at changes of weights")
    whole = [f"{prefix}.{name}".lstrip(".") for prefix, _, registry in parts for name in registry.whole]
    if whole and not view.slots:
        raise PEFTError(
            f"Nothing stands beside a weight here: {listed(whole)} is trained itself. Compare it with the base's."
        )
    _tell(whole)
    known = sorted({found for _, _, slot in view.slots for found, _ in slot.items()})
    if name is not None and name not in known:
        raise PEFTError(f"There is no adapter {name!r} here. Adapters: {', '.join(known)}.")
    for host_name, host, slot in view.slots:
        adapter = slot.active_adapter if name is None else slot._modules.get(name)
        if not isinstance(adapter, Adapter):
            continue
        yield host_name, change_of(host_name, host, adapter, weights=weights)


def change_of(name: str, host: nn.Module, adapter: Adapter, *, weights: bool = True) -> WeightChange:
    """Return the change that an adapter makes to the weight of its module, called ``name``.

    Raises:
        PEFTError: It is no change of a weight.
    """
    if wrong := not_finite(dict(adapter.named_parameters())):
        raise PEFTError(
            f"The {type(adapter).__name__} of {name!r} holds NaN or infinity in {listed(wrong)}: {_NO_SIZE}."
        )
    weight = read_matrix(host).clone() if weights and is_readable(host) else None
    if isinstance(adapter, LoRAAdapter) and type(adapter) in _IN_FACTORS:
        a, b = whole(adapter.lora_A).double(), whole(adapter.lora_B).double()
        return WeightChange(adapter.scale * b, a, a, b, weight)
    return _of_matrix(change_of_weight(name, host, adapter, torch.float64)[0], weight)


def _tell(whole: list[str]) -> None:
    if whole:
        warnings.warn(f"Trained itself, beside the adapters, and not looked at: {listed(whole)}.", stacklevel=3)


def is_readable(host: nn.Module) -> bool:
    """Whether the module's weight is a matrix of numbers that can be read."""
    return (is_linear(host) or isinstance(host, nn.Embedding)) and not is_packed(host)


def _of_matrix(change: Tensor, weight: Tensor | None) -> WeightChange:
    """Return a change in the smaller of its two trivial factorisations."""
    change = change.double()
    tall = len(change) >= change.shape[1]
    identity = torch.eye(min(change.shape), dtype=change.dtype, device=change.device)
    return WeightChange(*((change, identity) if tall else (identity, change)), weight=weight)


def read_changes(path: str | Path) -> dict[str, WeightChange]:
    """Return the change of every weight that a LoRA in a directory makes, by the module's name; no base is needed.

    Args:
        path: A directory of this package or of HF PEFT.

    Raises:
        PEFTError: It is no adapter directory, it is damaged, or it holds another method than LoRA, whose changes depend
            on the base's weights.
    """
    directory = Path(path)
    config, tensors = read_config(directory), read_tensors(directory / TENSOR_FILE)
    try:
        found, beside = read_low_rank(config, {name: tuple(t.shape) for name, t in tensors.items()}, str(path))
    except PEFTError as error:
        raise PEFTError(
            f"{error} Name its base model (on the command line by --base), so that it can be looked at there."
        ) from error
    _tell(beside)
    if wrong := not_finite({name: tensor for name, tensor in tensors.items() if name not in beside}):
        raise PEFTError(f"{path} holds NaN or infinity in {listed(wrong)}: {_NO_SIZE}.")
    return {
        host: WeightChange(
            pair.scale * tensors[pair.b].double(),
            tensors[pair.a].double(),
            tensors[pair.a].double(),
            tensors[pair.b].double(),
        )
        for host, pair in found.items()
    }
