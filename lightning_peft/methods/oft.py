"""OFT: Controlling Text-to-Image Diffusion by Orthogonal Finetuning (Qiu et al., 2023), arXiv:2306.07280, section 3.

In the form of OFTv2 (Qiu et al., 2025), arXiv:2506.19847, section 4: the input is rotated instead of the weight, which
may then be packed (QOFT).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.core.adapter import Adapter
from lightning_peft.core.calls import input_of, with_input
from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError, listed
from lightning_peft.targets.select import select
from lightning_peft.tensors.weights import features, is_linear, tensor_options

_MOST_TERMS = 50
"""Of the series: a file may ask for more, each of which takes a product."""


class OFTAdapter(Adapter):
    """h = W0 (Rᵀ x) + b; R ``[in, in]`` of orthogonal blocks, each made of the numbers above a diagonal.

    A block is Cayley's transform of the skew-symmetric Q with these numbers: (I - Q)(I + Q)⁻¹; or the first terms of
    Neumann's series for (I + Q)(I - Q)⁻¹, as HF PEFT has it.
    """

    mergeable = True
    folds_by_row = True
    changes_input = True

    def __init__(self, host: nn.Module, size: int, shared: bool, terms: int | None) -> None:
        super().__init__()
        blocks = 1 if shared else features(host)[0] // size
        self.oft_R = nn.Parameter(torch.empty(blocks, size * (size - 1) // 2, **tensor_options(host)))
        self.size, self.terms = size, terms
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set Q to zero: nothing is rotated."""
        nn.init.zeros_(self.oft_R)

    def _change(self) -> Tensor:
        """Return R - I, ``[blocks, size, size]``: exactly zero at the start, however products are rounded."""
        rows, columns = torch.triu_indices(self.size, self.size, 1, device=self.oft_R.device)
        upper = self.oft_R.new_zeros(len(self.oft_R), self.size, self.size)
        upper[:, rows, columns] = self.oft_R
        q = upper - upper.mT
        if self.terms is None:
            identity = torch.eye(self.size, dtype=q.dtype, device=q.device)
            exact: Tensor = torch.linalg.solve(identity + q, -2 * q, left=False)
            return exact
        change, power = torch.zeros_like(q), q
        for _ in range(2, self.terms):
            change, power = change + 2 * power, power @ q
        return change + power  # as HF PEFT has it: the last term once

    def before(
        self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Rotate the input ``[..., in]``."""
        x, change = input_of(args, kwargs), self._change()
        blocks = x.unflatten(-1, (-1, self.size))
        change = change.to(x.dtype).expand(blocks.shape[-2], -1, -1)
        rotated = x + torch.einsum("...kr,krc->...kc", blocks, change).flatten(-2)
        return with_input(args, kwargs, rotated.to(x.dtype))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return W0 Rᵀ."""
        change, blocks = self._change().detach().to(weight.dtype), weight.unflatten(-1, (-1, self.size))
        change = change.expand(blocks.shape[-2], -1, -1)
        return weight + torch.einsum("okc,krc->okr", blocks, change).flatten(-2), bias

    def extra_repr(self) -> str:
        """Show what parameters do not."""
        return f"size={self.size}, terms={self.terms}"


@dataclass(frozen=True, kw_only=True)
class OFT(PEFTMethod):
    """Rotate what linear layers are given, in blocks of features: angles and norms in their weights stay as they are.

    Args:
        block_size: Features that are rotated together; where they do not divide a layer's inputs, the nearest number
            that does.
        r: The number of blocks of a layer; then ``block_size`` is without meaning, and 0.
        block_share: Have all blocks of a layer share one rotation.
        use_cayley_neumann: Rotate by the first terms of a series, without an inverse: faster, and a rotation as long
            as the angles are small. Without it, rotations are exact whatever the angles.
        num_cayley_neumann_terms: How many terms.
        target_modules: What to adapt: ``all-linear`` (every linear layer but a language model's head), ``attention``,
            ``mlp``, or names, globs and regular expressions (``re:.*proj``). HF PEFT has no OFT for ``Conv1D``:
            files of these are in a format of our own.
        exclude_modules: Patterns of modules to leave out, with what is in them.
        layers: Blocks to adapt: indices, or a slice such as ``"8:16"`` or ``"-4:"``.
    """

    name: ClassVar[str] = "oft"
    hosts: ClassVar[str] = "linear layers"
    count: ClassVar[str] = "Σ in (b - 1) / 2"

    block_size: int = 32
    r: int = 0
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5
    target_modules: list[str] | str = "all-linear"
    exclude_modules: list[str] | str | None = None
    layers: list[int] | str | None = None

    def __post_init__(self) -> None:
        if not _is_whole(self.r, 0):
            raise PEFTError(f"OFT: r={self.r!r} was given; it is a number of blocks, or 0.")
        if self.r:
            object.__setattr__(self, "block_size", 0)
        elif not _is_whole(self.block_size, 2):
            raise PEFTError(f"OFT: block_size={self.block_size!r} was given; it is a whole number of at least 2.")
        terms = self.num_cayley_neumann_terms
        if not _is_whole(terms, 4) or terms > _MOST_TERMS:
            raise PEFTError(
                f"OFT: num_cayley_neumann_terms={terms!r} was given; it is a whole number from 4 to {_MOST_TERMS}."
            )

    def select(self, model: ModelView) -> dict[str, nn.Module]:
        """Return the linear layers that ``target_modules`` names."""
        return select(
            model,
            self.target_modules,
            adaptable=is_linear,
            obstacle=self._obstacle,
            exclude=self.exclude_modules,
            layers=self.layers,
        )

    def adapters(self, model: ModelView, hosts: Mapping[str, nn.Module], seed: int) -> dict[str, Adapter]:
        """Make the rotations, and say where blocks have another size than was asked for."""
        terms = self.num_cayley_neumann_terms if self.use_cayley_neumann else None
        if others := [name for name, host in hosts.items() if not self._divides(host)]:
            sizes = listed(f"{name!r} ({self.size(hosts[name])})" for name in others)
            asked = f"r={self.r}" if self.r else f"block_size={self.block_size}"
            model.remark(f"OFT: {asked} does not divide the inputs of all layers; blocks have other sizes in {sizes}.")
        return {name: OFTAdapter(host, self.size(host), self.block_share, terms) for name, host in hosts.items()}

    def size(self, host: nn.Module) -> int:
        """Return the size of the blocks beside ``host``, which HF PEFT's files do not say either."""
        d_in = features(host)[0]
        return d_in // nearest_divisor(d_in, self.r) if self.r else nearest_divisor(d_in, self.block_size)

    def _divides(self, host: nn.Module) -> bool:
        return features(host)[0] % (self.r or self.block_size) == 0

    def _obstacle(self, name: str, host: nn.Module) -> str | None:
        if self.size(host) == 1:
            return f"its {features(host)[0]} inputs make no blocks of about the size that was asked for"
        return None


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def nearest_divisor(number: int, wanted: int) -> int:
    """Return the divisor of ``number`` that is nearest to ``wanted``; of two, the smaller one."""
    divisors = (divisor for divisor in range(1, number + 1) if number % divisor == 0)
    return min(divisors, key=lambda divisor: (abs(divisor - wanted), divisor))
