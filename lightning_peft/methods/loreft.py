"""LoReFT: ReFT: Representation Finetuning for Language Models (Wu et al., 2024), arXiv:2404.03592, section 3.2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_peft.adapters.virtual_tokens.infix import PromptEnd, prompt_ends
from lightning_peft.adapters.virtual_tokens.of_call import OfCall
from lightning_peft.adapters.virtual_tokens.virtual_tokens import by_name, find_decoder
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.calls import on_hidden
from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.structure.layers import in_layers
from lightning_peft.tensors.seeding import fill
from lightning_peft.tensors.weights import tensor_options

_WORDS = "LoReFT", "its last tokens are"


class EndOfPrompt(PromptEnd):
    """On the model around the decoder: its labels show where prompts end."""

    words = _WORDS


class Places(Adapter):
    """On the decoder: finds, in each call that a text begins with, the tokens whose hidden states are changed."""

    by_row = False

    def __init__(self, first: int, last: int, end: PromptEnd) -> None:
        super().__init__()
        self._numbers = first, last
        # In a tuple, so that it is no child.
        self._end = (end,)
        self.of_call = OfCall("LoReFT", "which tokens were changed")

    def reset_parameters(self) -> None:
        """Do nothing: there are no values."""

    def before(
        self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Find them; what a filled cache goes on with is no prompt any more."""
        named, cache = by_name(base, args, kwargs)
        labels = self._end[0].labels() if self._numbers[1] else None
        begins = cache is None or cache.get_seq_length() == 0
        self.of_call.value = self._places(named, labels) if begins else None
        return args, kwargs

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Have them known again when layers of this call are computed again."""
        self.of_call.follow(output[0])
        return output

    def _places(self, named: Mapping[str, Any], labels: Tensor | None) -> Tensor:
        """Return which tokens they are, bool ``[batch, tokens, 1]``."""
        text = named["inputs_embeds"] if named.get("input_ids") is None else named["input_ids"]
        mask = named.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != text.shape[:2]):
            shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise PEFTError(
                f"LoReFT: an attention mask of shape {shape} was given with a text of {list(text.shape[:2])}; one of "
                "[batch, tokens] was expected, which shows where a text begins. Generate without cache_implementation."
            )
        real = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device) if mask is None else mask != 0
        first, last = self._numbers
        if last:
            columns = torch.arange(real.shape[1], device=real.device)
            real = real & (columns < prompt_ends(real, labels, _WORDS)[:, None])
        from_start, from_end = real.cumsum(1), real.flip(1).cumsum(1).flip(1)
        return (real & ((from_start <= first) | (from_end <= last)))[..., None]


class LoReFTAdapter(Adapter):
    """h + Rᵀ (W h + b - R h) (equation 2) for some tokens; W, R ``[r, hidden]``, b ``[r]``, the rows of R orthonormal.

    R is what orthonormalises the rows of a matrix that is trained, by the triangular factor of their products.
    """

    by_row = False

    def __init__(self, host: nn.Module, width: int, r: int, places: Places, seed: int, name: str) -> None:
        super().__init__()
        options = tensor_options(host)
        self.rotation = nn.Parameter(torch.empty(r, width, **options))
        self.source = nn.Parameter(torch.empty(r, width, **options))
        self.source_bias = nn.Parameter(torch.empty(r, **options))
        self._places, self._seed, self._name = (places,), seed, name
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw R, and set W to it and b to zero: hidden states stay what they are."""
        fill(self.rotation, self._seed, self._name, _orthonormal)
        with torch.no_grad():
            self.source.copy_(self._rotation())
            self.source_bias.zero_()

    def _rotation(self) -> Tensor:
        rows = self.rotation
        factor = torch.linalg.cholesky_ex(rows @ rows.mT)[0]
        found: Tensor = torch.linalg.solve_triangular(factor, rows, upper=False)
        return found

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Change the hidden states that the layer gives, in their places."""
        places: Tensor | None = self._places[0].of_call.value
        if places is None:
            return output
        rotation = self._rotation()

        def changed(hidden: Tensor) -> Tensor:
            # The difference is taken in full precision: it is small beside both.
            r, difference = rotation.to(hidden.dtype), (self.source - rotation).to(hidden.dtype)
            moved = functional.linear(hidden, difference, self.source_bias.to(hidden.dtype)) @ r
            return (hidden + torch.where(places.to(hidden.device), moved, 0)).to(hidden.dtype)

        return on_hidden(output, changed)


@dataclass(frozen=True, kw_only=True)
class LoReFT(PEFTMethod):
    """Change what the layers make of a prompt's first and last tokens, in a subspace; what follows attends to these.

    It leaves the time of each generated token as it is, since the prompt's hidden states are in the cache.

    Args:
        r: Dimensions of the subspace.
        prefix_positions: How many tokens at the beginning of a text.
        suffix_positions: How many at the end of its prompt, which ends before the first label other than -100 if the
            model is called with ``labels`` (or within
            :func:`lightning_peft.adapters.virtual_tokens.infix.answers`), else with the text.
        layers: Layers whose outputs are changed: indices, or a slice such as ``"8:16"`` or ``"-4:"``.
    """

    name: ClassVar[str] = "loreft"
    mergeable: ClassVar[bool] = False
    hosts: ClassVar[str] = "decoder-only transformers models"
    count: ClassVar[str] = "L (2 r d + r)"

    r: int = 8
    prefix_positions: int = 3
    suffix_positions: int = 0
    layers: list[int] | str | None = None

    def __post_init__(self) -> None:
        for what, least in (("r", 1), ("prefix_positions", 0), ("suffix_positions", 0)):
            value = getattr(self, what)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise PEFTError(f"LoReFT: {what}={value!r} was given; it is a whole number of at least {least}.")
        if not self.prefix_positions + self.suffix_positions:
            raise PEFTError("LoReFT: prefix_positions=0 and suffix_positions=0 were given; one of them is at least 1.")

    def select(self, model: ModelView) -> dict[str, nn.Module]:
        """Return the layers, the decoder that they are in, and what knows the labels."""
        decoder = find_decoder(model, "LoReFT")
        if self.r > decoder.config.hidden_size:
            raise PEFTError(
                f"LoReFT: r={self.r} was given, but hidden states have {decoder.config.hidden_size} dimensions. Take a "
                "smaller r."
            )
        around: Any = model.modules[decoder.around]
        knows_labels = around is not decoder.module and around.get_output_embeddings() is not None
        names = [decoder.around] if self.suffix_positions and knows_labels else []
        names += [decoder.name, *in_layers(model, decoder.layers(), self.layers)]
        return {name: model.modules[name] for name in names}

    def adapters(self, model: ModelView, hosts: Mapping[str, nn.Module], seed: int) -> dict[str, Adapter]:
        """Make the changes of layers, and what tells them the places."""
        if missing := self.select(model).keys() - hosts.keys():
            raise PEFTError(f"LoReFT: train_also trains {sorted(missing)[0]!r} whole, which it changes.")
        decoder = find_decoder(model, "LoReFT")
        end, width = EndOfPrompt(), decoder.config.hidden_size
        places = Places(self.prefix_positions, self.suffix_positions, end)
        made: dict[str, Adapter] = {decoder.around: end} if decoder.around in hosts else {}
        made[decoder.name] = places
        layers = [name for name in hosts if name not in made]
        return made | {name: LoReFTAdapter(hosts[name], width, self.r, places, seed, name) for name in layers}


def _orthonormal(values: Tensor, generator: torch.Generator) -> None:
    nn.init.orthogonal_(values, generator=generator)
