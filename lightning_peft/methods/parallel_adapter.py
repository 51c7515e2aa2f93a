"""Parallel adapters: Towards a Unified View of Parameter-Efficient Transfer Learning (He et al., 2022).

arXiv:2110.04366, sections 3.3 and 4.6: the "scaled parallel adapter".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from lightning_peft.adapters.bottleneck.bottleneck import Bottleneck, Shape
from lightning_peft.adapters.bottleneck.tap import Tap
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.calls import input_of, on_hidden
from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.structure.blocks import Block, find_blocks, widths
from lightning_peft.targets.select import select
from lightning_peft.tensors.weights import tensor_options

Place = Literal["attention", "mlp"]


class ParallelBottleneck(Bottleneck):
    """H_o <- H_o + s · f(H_i W_down) W_up; H_i is what the tap's host is given, or the host itself without a tap."""

    def __init__(self, *args: Any, tap: Tap | None = None) -> None:
        super().__init__(*args)
        self.tap = tap

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Add the bottleneck's output to the hidden state in ``output``."""
        delta = self.branch(input_of(args, kwargs) if self.tap is None else _tapped(self.tap))
        return on_hidden(output, lambda hidden: hidden + delta)


def _tapped(tap: Tap) -> Tensor:
    seen = tap.take()
    if seen is None:
        raise PEFTError(
            "ParallelAdapter: the last module of a block ran without its first one. Name modules to adapt in "
            "target_modules."
        )
    return seen.input


@dataclass(frozen=True, kw_only=True)
class ParallelAdapter(PEFTMethod):
    """Bottleneck layers beside attention or MLP.

    Args:
        bottleneck: Width of the bottleneck.
        placement: Beside what, in each layer: ``["mlp"]``, ``["attention"]`` or both. The bottleneck gets what the
            first linear layer of the block gets; its output is added to what the last one returns.
        scale: The bottleneck's output is multiplied by it.
        activation: The function between the two matrices.
        bias: Whether the two linear maps have biases.
        dropout: Probability with which an element of the adapter's input is zeroed during training.
        init: ``zero_up`` (starts as the identity), ``normal`` or ``truncated``.
        target_modules: Modules beside each of which to put an adapter, by pattern, instead of a placement:
            ``["up_proj", "down_proj"]`` is the parallel adapter of LLM-Adapters.
        exclude_modules: Patterns of modules to leave out, with ``target_modules``.
        layers: Layers to adapt: indices, or a slice such as ``"8:16"`` or ``"-4:"``.
    """

    name: ClassVar[str] = "parallel_adapter"
    mergeable: ClassVar[bool] = False
    hosts: ClassVar[str] = "attention, MLP, any module"
    count: ClassVar[str] = "L (2db + b + d)"

    bottleneck: int = 512
    placement: list[Place] | None = None
    scale: float = 4.0
    activation: str = "relu"
    bias: bool = True
    dropout: float = 0.0
    init: str = "zero_up"
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers: list[int] | str | None = None

    def __post_init__(self) -> None:
        given = ["mlp"] if self.placement is None else self.placement
        places = [given] if isinstance(given, str) else list(given)
        object.__setattr__(self, "placement", places)
        if not places or set(places) - {"attention", "mlp"}:
            raise PEFTError(
                f"ParallelAdapter: placement={self.placement!r} was given; it is a list of 'attention' and 'mlp'."
            )
        self._shape()

    def _shape(self) -> Shape:
        return Shape(
            "ParallelAdapter", self.bottleneck, self.activation, self.bias, self.dropout, self.scale, self.init
        )

    def select(self, model: ModelView) -> dict[str, nn.Module]:
        """Return the first and the last module of every block."""
        if self.target_modules is not None:
            return select(model, self.target_modules, adaptable=_any, exclude=self.exclude_modules, layers=self.layers)
        names = dict.fromkeys(name for block in self._blocks(model) for name in (block.first, block.last))
        return {name: model.modules[name] for name in names}

    def adapters(self, model: ModelView, hosts: Mapping[str, nn.Module], seed: int) -> dict[str, Adapter]:
        """Make a bottleneck for the last module of every block and a tap for the first one."""
        made: dict[str, Adapter] = {}
        if self.target_modules is not None:
            for name, module in hosts.items():
                sizes = widths(model, name)
                made[name] = ParallelBottleneck(*sizes, self._shape(), tensor_options(module), seed, name)
            return made
        for block in self._blocks(model):
            if {block.first, block.last} - hosts.keys():
                continue
            tap = None
            if block.first != block.last:
                made[block.first] = tap = Tap()
            options = tensor_options(hosts[block.last])
            made[block.last] = ParallelBottleneck(
                block.width, block.width, self._shape(), options, seed, block.last, tap=tap
            )
        return made

    def _blocks(self, model: ModelView) -> list[Block]:
        return find_blocks(model, self.placement or (), self.layers)


def _any(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())
