"""BEFT: Bias-Efficient Fine-Tuning of Language Models in Low-Data Regimes (Huang et al., 2026), arXiv:2509.15974."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lightning_peft.adapters.added_bias import AddedBias
from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.structure.blocks import find_blocks
from lightning_peft.targets.select import select
from lightning_peft.tensors.weights import is_linear


class BiasChange(AddedBias):
    """h = W0 x + b0 + b; b ``[1, out]``, as HF PEFT's files have it."""

    axes: ClassVar[dict[str, tuple[str | None, ...]]] = {"beft_bias": (None, "out")}
    key: ClassVar[str] = "beft_bias"
    rows: ClassVar[tuple[int, ...]] = (1,)


@dataclass(frozen=True, kw_only=True)
class BEFT(PEFTMethod):
    """Train a bias beside each value projection, or beside other linear layers, whether they have one or not.

    With ``target_modules="all-linear"`` it is what :class:`BitFit` is to linear layers, in a form that HF PEFT reads:
    the layers' own biases stay as they are.

    Args:
        target_modules: What to adapt: ``all-linear`` (every linear layer but a language model's head), ``attention``,
            ``mlp``, or names, globs and regular expressions (``re:.*proj``). By default the value projections, and
            where they are fused with the query's, that layer as a whole. HF PEFT has no BEFT for ``Conv1D``:
            files of these are in a format of our own.
        exclude_modules: Patterns of modules to leave out, with ``target_modules``.
        layers: Blocks to adapt: indices, or a slice such as ``"8:16"`` or ``"-4:"``.
    """

    name: ClassVar[str] = "beft"
    hosts: ClassVar[str] = "linear layers"
    count: ClassVar[str] = "Σ out"

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers: list[int] | str | None = None

    def __post_init__(self) -> None:
        if self.exclude_modules is not None and self.target_modules is None:
            raise PEFTError(
                "BEFT: exclude_modules was given without target_modules; it names those of them to leave out. Give "
                "both, or neither."
            )

    def select(self, model: ModelView) -> dict[str, nn.Module]:
        """Return the linear layers that ``target_modules`` names, or the value projections."""
        if self.target_modules is None:
            return {name: model.modules[name] for name in self._values(model)}
        return select(model, self.target_modules, adaptable=is_linear, exclude=self.exclude_modules, layers=self.layers)

    def adapter(self, name: str, module: nn.Module, seed: int) -> BiasChange:
        """Make the bias of the linear layer ``module``."""
        return BiasChange(module)

    def _values(self, model: ModelView) -> list[str]:
        """Return the names of the layers that give the values of attention."""
        found = []
        for block in find_blocks(model, ["attention"], self.layers):
            role = next((role for role in ("v", "kv", "qkv") if role in block.roles), None)
            if role is None:
                raise PEFTError(
                    f"BEFT: {block.last!r} ({type(model.modules[block.last]).__name__}) has no value projection of its "
                    "own that is called. Name linear layers in target_modules."
                )
            found.append(block.roles[role])
        return found
