"""Series adapters: Parameter-Efficient Transfer Learning for NLP (Houlsby et al., 2019), arXiv:1902.00751, section 2.1.

Placements of later papers: at the end of the layer (Pfeiffer et al., 2021, arXiv:2005.00247; the equation is that of
MAD-X, 2020, arXiv:2005.00052), and around the MLP's linear layers (LLM-Adapters: Hu et al., 2023, arXiv:2304.01933,
section 3.2).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from torch import nn

from lightning_peft.adapters.bottleneck.bottleneck import Bottleneck, Shape
from lightning_peft.adapters.bottleneck.residual import ResidualBottleneck
from lightning_peft.adapters.bottleneck.tap import Tap
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.calls import input_of, on_hidden, with_input
from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.structure.blocks import Block, find_blocks, layer_norms, widths
from lightning_peft.targets.select import select
from lightning_peft.tensors.weights import tensor_options

Place = Literal["attention", "mlp", "mlp_input", "layer", "residual"]
PLACES: set[Place] = set(get_args(Place))
Preset = Literal["houlsby", "pfeiffer", "llm_adapters"]

PRESETS: dict[str, dict[str, Any]] = {
    "houlsby": {
        "placement": ["attention", "mlp"],
        "activation": "gelu",
        "bias": True,
        "init": "truncated",
        "train_norms": True,
    },
    "pfeiffer": {
        "placement": ["residual"],
        "activation": "relu",
        "bias": True,
        "init": "truncated",
        "train_norms": False,
    },
    "llm_adapters": {
        "placement": ["mlp"],
        "activation": "tanh",
        "bias": False,
        "init": "normal",
        "train_norms": False,
    },
}


class SeriesBottleneck(Bottleneck):
    """H <- H + f(H W_down) W_up on what its host returns."""

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Send the hidden state in ``output`` through the bottleneck."""
        return on_hidden(output, lambda hidden: hidden + self.branch(hidden))


class InputBottleneck(Bottleneck):
    """H <- H + f(H W_down) W_up on what its host is given."""

    def before(
        self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Send the first argument through the bottleneck."""
        hidden = input_of(args, kwargs)
        return with_input(args, kwargs, hidden + self.branch(hidden))


@dataclass(frozen=True, kw_only=True)
class SeriesAdapter(PEFTMethod):
    """Bottleneck layers with a residual connection, one after another with the model's own layers.

    Args:
        bottleneck: Width of the bottleneck.
        preset: Defaults for the rest: ``houlsby`` (after attention and MLP, GELU, biases, LayerNorms trained),
            ``pfeiffer`` (at the end of each layer, ReLU, biases) or ``llm_adapters`` (after the MLP, tanh, no biases,
            both matrices from N(0, 0.02²): not the identity at first).
        placement: Where, in each layer: after ``attention``, after the ``mlp``, before each first linear layer of the
            MLP (``mlp_input``), after the whole ``layer``, or in the ``residual`` stream at its end, which is before
            the norm in layers that end in one (BERT). A list of these; the preset's, if not given. The first two stand
            before dropout, residual connection and norm.
        activation: The function between the two matrices.
        bias: Whether the two linear maps have biases.
        scale: The bottleneck's output is multiplied by it.
        dropout: Probability with which an element of the adapter's input is zeroed during training.
        init: ``truncated``, ``normal`` or ``zero_up`` (starts as the identity).
        train_norms: Train the LayerNorms of the adapted layers too.
        target_modules: Modules after which to put an adapter, by pattern, instead of a placement.
        exclude_modules: Patterns of modules to leave out, with ``target_modules``.
        layers: Layers to adapt: indices, or a slice such as ``"8:16"`` or ``"-4:"``.
    """

    name: ClassVar[str] = "series_adapter"
    mergeable: ClassVar[bool] = False
    hosts: ClassVar[str] = "attention, MLP, layers, any module"
    count: ClassVar[str] = "L (2db + b + d) + norms"

    bottleneck: int = 64
    preset: Preset = "houlsby"
    placement: list[Place] | None = None
    activation: str | None = None
    bias: bool | None = None
    scale: float = 1.0
    dropout: float = 0.0
    init: str | None = None
    train_norms: bool | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers: list[int] | str | None = None

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise PEFTError(f"SeriesAdapter: preset={self.preset!r} was given; it is one of {', '.join(PRESETS)}.")
        for key, value in PRESETS[self.preset].items():
            if getattr(self, key) is None:
                object.__setattr__(self, key, value)
        places = [self.placement] if isinstance(self.placement, str) else list(self.placement or ())
        object.__setattr__(self, "placement", places)
        if not places or set(places) - PLACES:
            raise PEFTError(
                f"SeriesAdapter: placement={self.placement!r} was given; it is a list of "
                f"{', '.join(map(repr, get_args(Place)))}."
            )
        if {"layer", "residual"} <= set(places):
            raise PEFTError(
                f"SeriesAdapter: placement={places!r} was given; 'layer' and 'residual' adapt one module. Give one."
            )
        self._shape()

    def _shape(self) -> Shape:
        return Shape(
            "SeriesAdapter", self.bottleneck, str(self.activation), bool(self.bias), self.dropout, self.scale,
            str(self.init),
        )  # fmt: skip

    def select(self, model: ModelView) -> dict[str, nn.Module]:
        """Return the modules after which (or before which) there is an adapter."""
        if self.target_modules is not None:
            return select(model, self.target_modules, adaptable=_any, exclude=self.exclude_modules, layers=self.layers)
        return {name: model.modules[name] for name in self._places(model)}

    def trained(self, model: ModelView) -> Iterable[str]:
        """Return the parameters of the LayerNorms in the adapted layers."""
        if not self.train_norms:
            return []
        norms = layer_norms(model)
        if self.target_modules is None:
            layers = tuple(f"{b.layer}." if b.layer else "" for b in self._blocks(model))
            norms = {name: norm for name, norm in norms.items() if name.startswith(layers)}
        return [f"{name}.{parameter}" for name, norm in norms.items() for parameter, _ in norm.named_parameters()]

    def adapters(self, model: ModelView, hosts: Mapping[str, nn.Module], seed: int) -> dict[str, Adapter]:
        """Make one bottleneck for each place."""
        places = self._places(model) if self.target_modules is None else {}
        taps = {name: Tap() for name in hosts if name in places and places[name][0] is Tap}
        made: dict[str, Adapter] = dict(taps)
        for name in [name for name in hosts if name not in taps]:
            kind, width = places.get(name) or (SeriesBottleneck, widths(model, name)[1])
            options = {"norms": _taps_in(model, name, taps)} if kind is ResidualBottleneck else {}
            made[name] = kind(width, width, self._shape(), tensor_options(hosts[name]), seed, name, **options)
        return made

    def _blocks(self, model: ModelView) -> list[Block]:
        places = set(self.placement or ())
        kinds: list[Literal["attention", "mlp"]] = []
        if places & {"attention", "layer", "residual"}:
            kinds.append("attention")
        if places & {"mlp", "mlp_input"}:
            kinds.append("mlp")
        return find_blocks(model, kinds, self.layers)

    def _places(self, model: ModelView) -> dict[str, tuple[Any, int]]:
        """Return, by name of the host, what kind of adapter it has, and the width of its hidden state."""
        found: dict[str, tuple[Any, int]] = {}
        for block in self._blocks(model):
            if block.kind in (self.placement or ()):
                found[block.last] = (SeriesBottleneck, block.width)
            if block.kind == "mlp" and "mlp_input" in (self.placement or ()):
                for name in block.inputs or (block.first,):
                    if name in found:
                        raise PEFTError(
                            f"SeriesAdapter: {name!r} is one module, which cannot have an adapter on both sides. Give "
                            "'mlp' or 'mlp_input' as placement."
                        )
                    found[name] = (InputBottleneck, block.width)
            if "layer" in (self.placement or ()):
                found[block.layer] = (SeriesBottleneck, block.width)
            if "residual" in (self.placement or ()):
                found[block.layer] = (ResidualBottleneck, block.width)
                found.update(dict.fromkeys(_norms_in(model, block.layer).values(), (Tap, block.width)))
        return found


def _norms_in(model: ModelView, layer: str) -> dict[str, str]:
    """Return the names of the norms of a layer in the model, by their names in the layer."""
    lead = f"{layer}." if layer else ""
    return {name.removeprefix(lead): name for name in layer_norms(model) if name.startswith(lead)}


def _taps_in(model: ModelView, layer: str, taps: Mapping[str, Tap]) -> dict[str, Tap]:
    norms = _norms_in(model, layer)
    if missing := sorted(norms.values() - taps.keys()):
        raise PEFTError(
            f"SeriesAdapter: placement='residual' listens to {missing[0]!r}, which train_also trains whole. Leave it "
            "out there and give train_norms=True."
        )
    return {name: taps[norm] for name, norm in norms.items()}


def _any(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())
