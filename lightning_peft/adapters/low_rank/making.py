"""Making low-rank adapters: beside a module, of parts of it, of weights that it reads itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, nn

from lightning_peft.adapters.low_rank.fused import FusedLoRAAdapter
from lightning_peft.adapters.low_rank.linear import LoRAAdapter
from lightning_peft.adapters.low_rank.own_weights import OwnWeightsLoRAAdapter, factor_shapes
from lightning_peft.adapters.low_rank.shared_input import SharedInput
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.sharding import full_shape
from lightning_peft.core.weights import features
from lightning_peft.errors import PEFTError

_Freezable = TypeVar("_Freezable", LoRAAdapter, FusedLoRAAdapter, OwnWeightsLoRAAdapter)


@dataclass(frozen=True)
class Maker:
    """What the low-rank adapters of one method have in common."""

    method: str
    """What to call the method in errors."""
    kinds: tuple[type[LoRAAdapter], ...]
    """The adapters that stand beside modules, one for each kind of module."""
    rank_and_scale: Callable[[str], tuple[int, float]]
    """By the name of a module, or of a weight."""
    dropout: float
    init: str
    freeze_A: bool
    seed: int

    def beside(self, name: str, module: nn.Module) -> LoRAAdapter:
        """Make the adapter that stands beside ``module``.

        Raises:
            PEFTError: The rank is too large, or the module has something that the adapter cannot follow.
        """
        r, scale = self.rank_and_scale(name)
        kind = next(kind for kind in self.kinds if kind.serves(module))
        shapes = kind.shapes(module, r)
        self._refuse_rank(name, r, math.prod(shapes["lora_A"][1:]), shapes["lora_B"][0])
        if refusal := kind.refusal(module, r, self.dropout, self.freeze_A):
            raise PEFTError(f"{self.method}: {name!r} cannot be adapted: {refusal}. Exclude it.")
        return self._frozen(kind(module, r, scale, self.dropout, self.init, self.seed, name))

    def of_parts(self, name: str, module: nn.Module, rows: Mapping[str, Tensor]) -> FusedLoRAAdapter:
        """Make the adapter of parts of ``module``, which have these rows of its weight.

        Raises:
            PEFTError: The rank is too large.
        """
        r, scale = self.rank_and_scale(name)
        self._refuse_rank(name, r, features(module)[0], min(map(len, rows.values())))
        return self._frozen(FusedLoRAAdapter(module, rows, r, scale, self.dropout, self.init, self.seed, name))

    def of_weights(self, host: str, module: nn.Module, weights: Mapping[str, str]) -> OwnWeightsLoRAAdapter:
        """Make the adapter of weights that ``module`` reads itself, each given with the name that it was chosen by.

        Raises:
            PEFTError: A rank is too large, or there is dropout.
        """
        if self.dropout:
            raise PEFTError(
                f"{self.method}: dropout={self.dropout} was given, but {host!r} (a {type(module).__name__}) "
                "reads its weights itself: there is no low-rank term to drop inputs of. Set dropout=0, or exclude it."
            )
        ranks, scales = {}, {}
        for weight, name in weights.items():
            ranks[weight], scales[weight] = self.rank_and_scale(name)
            (_, d_in), (d_out, _) = factor_shapes(module, weight, ranks[weight])
            self._refuse_rank(name, ranks[weight], d_in, d_out)
        return self._frozen(OwnWeightsLoRAAdapter(module, ranks, scales, self.init, self.seed, host))

    def _frozen(self, adapter: _Freezable) -> _Freezable:
        if self.freeze_A:
            adapter.freeze_A()
        return adapter

    def _refuse_rank(self, name: str, r: int, d_in: int, d_out: int) -> None:
        if r > min(d_in, d_out):
            raise PEFTError(
                f"{self.method}: r={r} was given, but {name!r} is {d_in} → {d_out}: the rank of an update of "
                f"it is at most {min(d_in, d_out)}. Take a smaller r, set rank_pattern={{{name!r}: …}}, or exclude it."
            )


def share_inputs(groups: Iterable[Sequence[str]], made: Mapping[str, Adapter]) -> None:
    """Have the adapters of layers that are given the same input, which ``groups`` names, share its product with A."""
    for names in groups:
        members = [adapter for name in names if isinstance(adapter := made.get(name), LoRAAdapter)]
        shared = SharedInput(*members)
        for adapter in members:
            adapter.shared_input = shared


def ranks_and_scales(host: str, adapter: Adapter) -> list[tuple[str, int, float]]:
    """Return ``(name, rank, scale)`` of what an adapter changes: its host, or weights of it by names of their own."""
    if isinstance(adapter, OwnWeightsLoRAAdapter):
        return [(name, factors.r, factors.scale) for name, factors in adapter.changed(host)]
    assert isinstance(adapter, LoRAAdapter)
    parts = len(adapter.sizes) if isinstance(adapter, FusedLoRAAdapter) else 1
    return [(host, full_shape(adapter.lora_A)[0] // parts, adapter.scale)]
