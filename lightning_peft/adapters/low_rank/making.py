"""Making low-rank adapters: beside a module, of parts of it, of weights that it reads itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from lightning_peft.adapters.low_rank.fused import FusedLoRAAdapter
from lightning_peft.adapters.low_rank.linear import LoRAAdapter
from lightning_peft.adapters.low_rank.own_weights import (
    OwnWeightsLoRAAdapter,
    attention_weights,
    factor_shapes,
    weight_obstacle,
)
from lightning_peft.adapters.low_rank.shared_input import SharedInput
from lightning_peft.core.adapter import Adapter
from lightning_peft.errors import PEFTError, listed
from lightning_peft.tensors.sharding import full_shape
from lightning_peft.tensors.weights import features

_Freezable = TypeVar("_Freezable", LoRAAdapter, FusedLoRAAdapter, OwnWeightsLoRAAdapter)


@dataclass(frozen=True)
class Maker:
    """What the low-rank adapters of one method have in common."""

    method: str
    """What to call the method in messages."""
    kinds: tuple[type[LoRAAdapter], ...]
    """The adapters that stand beside modules, one for each kind of module."""
    rank: Callable[[str], int]
    """The rank that was asked for, by the name of a module, or of a weight."""
    scale: Callable[[str, int], float]
    """What B A is multiplied by, by such a name and the rank."""
    named: Callable[[str], bool]
    """Whether it was asked for just this module. Elsewhere is taken what fits."""
    dropout: float
    init: str
    freeze_A: bool
    seed: int

    def obstacle(self, name: str, module: nn.Module) -> str | None:
        """Return why ``module``, or its weight ``name``, cannot be adapted, and what to do, if it cannot."""
        if isinstance(module, nn.MultiheadAttention):
            derived = set(attention_weights(module)) - dict(module.named_parameters()).keys()
            return f"its {min(derived)} is worked out from other parameters" if derived else None
        if not any(kind.serves(module) for kind in self.kinds):
            return weight_obstacle(module, name.rpartition(".")[2])
        return self._kind(module).refusal(module, self.rank(name), self.dropout, self.freeze_A)

    def beside(self, name: str, module: nn.Module) -> LoRAAdapter:
        """Make the adapter that stands beside ``module``.

        Raises:
            PEFTError: The rank is too large.
        """
        kind = self._kind(module)
        r, scale = self._rank_and_scale(name, self._sizes(name, module))
        return self._frozen(kind(module, r, scale, self.dropout, self.init, self.seed, name))

    def of_parts(self, name: str, module: nn.Module, rows: Mapping[str, Tensor]) -> FusedLoRAAdapter:
        """Make the adapter of parts of ``module``, which have these rows of its weight.

        Raises:
            PEFTError: The rank is too large.
        """
        r, scale = self._rank_and_scale(name, (features(module)[0], min(map(len, rows.values()))))
        return self._frozen(FusedLoRAAdapter(module, rows, r, scale, self.dropout, self.init, self.seed, name))

    def of_weights(self, host: str, module: nn.Module, weights: Mapping[str, str]) -> OwnWeightsLoRAAdapter:
        """Make the adapter of weights that ``module`` reads itself, each given with the name that it was chosen by.

        Raises:
            PEFTError: A rank is too large, or there is dropout.
        """
        if self.dropout and any(map(self.named, weights.values())):
            raise PEFTError(
                f"{self.method}: dropout={self.dropout} was given, but {host!r} (a {type(module).__name__}) "
                "reads its weights itself: there is no low-rank term to drop inputs of. Set dropout=0, or exclude it."
            )
        sizes: dict[str, tuple[int, int]] = {}
        for weight, name in weights.items():
            (_, d_in), (d_out, _) = factor_shapes(module, weight, 1)
            # Weights that were chosen by one name have one rank.
            least_in, least_out = sizes.get(name, (d_in, d_out))
            sizes[name] = min(d_in, least_in), min(d_out, least_out)
        found = {weight: self._rank_and_scale(name, sizes[name]) for weight, name in weights.items()}
        ranks = {weight: r for weight, (r, _) in found.items()}
        scales = {weight: scale for weight, (_, scale) in found.items()}
        return self._frozen(OwnWeightsLoRAAdapter(module, ranks, scales, self.init, self.seed, host))

    def remarks(self, made: Mapping[str, Adapter]) -> Iterator[str]:
        """Yield what to tell a user of adapters that are less than was asked for."""
        pairs = [pair for host, adapter in made.items() for pair in ranks_and_scales(host, adapter)]
        if lower := {name: r for name, r, _ in pairs if r < self.rank(name)}:
            yield lowered_ranks(self.method, f"r={max(map(self.rank, lower))}", lower)
        reading = [repr(host) for host, adapter in made.items() if isinstance(adapter, OwnWeightsLoRAAdapter)]
        if self.dropout and reading:
            yield (
                f"{self.method}: dropout={self.dropout} has no effect on {listed(reading)}: modules that read their "
                "weights themselves, where there is no low-rank term to drop inputs of."
            )

    def written(self, targets: dict[str, Any], modules: Mapping[str, nn.Module]) -> str:
        """Return what to write to adapt ``modules``, which ``targets`` names: each with a rank that it can have."""
        most = {name: min(self._sizes(name, module)) for name, module in modules.items()}
        narrow = {name: rank for name, rank in most.items() if rank < self.rank(name)}
        given = {"r": self.rank(""), **targets, **({"rank_pattern": narrow} if narrow else {})}
        return f"{self.method}({', '.join(f'{option}={value!r}' for option, value in given.items())})"

    def _sizes(self, name: str, module: nn.Module) -> tuple[int, int]:
        """Return the numbers of inputs and outputs of a module, or of the weight of it that is called ``name``."""
        if isinstance(module, nn.MultiheadAttention):
            return module.embed_dim, module.embed_dim
        if not any(kind.serves(module) for kind in self.kinds):
            (_, d_in), (d_out, _) = factor_shapes(module, name.rpartition(".")[2], 1)
            return d_in, d_out
        ones = self._kind(module).shapes(module, 1)
        return math.prod(ones["lora_A"][1:]), ones["lora_B"][0]

    def _kind(self, module: nn.Module) -> type[LoRAAdapter]:
        return next(kind for kind in self.kinds if kind.serves(module))

    def _rank_and_scale(self, name: str, sizes: tuple[int, int]) -> tuple[int, float]:
        r = fitting_rank(self.method, "r", self.rank(name), name, sizes, lower=not self.named(name))
        return r, self.scale(name, r)

    def _frozen(self, adapter: _Freezable) -> _Freezable:
        if self.freeze_A:
            adapter.freeze_A()
        return adapter


def fitting_rank(method: str, option: str, r: int, name: str, sizes: tuple[int, int], lower: bool) -> int:
    """Return ``r``, or the largest rank that an update of a module can have if it is less and ``lower`` allows it.

    Args:
        method: What to call the method in errors.
        option: What to call the rank.
        r: The rank that was asked for.
        name: The module's name.
        sizes: Its numbers of inputs and outputs.
        lower: Whether another rank may be taken.

    Raises:
        PEFTError: It is less, and has to be what was asked for.
    """
    if r <= (most := min(sizes)) or lower:
        return min(r, most)
    raise PEFTError(
        f"{method}: {option}={r} was given, but {name!r} is {sizes[0]} → {sizes[1]}: the rank of an update of it is at "
        f"most {most}. Take a smaller {option}, set rank_pattern={{{name!r}: {most}}}, train the module whole with "
        f"train_also=[{name!r}], or exclude it."
    )


def lowered_ranks(method: str, option: str, ranks: Mapping[str, int]) -> str:
    """Return what to tell a user of modules that got lower ranks, given by name, than ``option`` asked for."""
    pairs = listed(f"{name!r} ({r})" for name, r in ranks.items())
    return f"{method}: {option} is more than fits in these modules, which get the largest rank that does: {pairs}."


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
