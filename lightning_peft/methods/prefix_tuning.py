"""Prefix-Tuning: Optimizing Continuous Prompts for Generation (Li & Liang, 2021), arXiv:2101.00190.

Section 4.2 (keys and values before those of the text, in every layer) and 4.3 (reparameterisation by an MLP).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_peft.adapter import Adapter
from lightning_peft.errors import PEFTError
from lightning_peft.method import PEFTMethod
from lightning_peft.seeding import fill
from lightning_peft.virtual_tokens import (
    Decoder,
    by_name,
    cache_parameter,
    find_decoder,
    rebuilt,
    require_room,
    require_tokens,
    widened,
)
from lightning_peft.weights import tensor_options


class Prefixes(nn.Module):
    """The prefixes of all layers: ``[tokens, layers · 2 · heads · head_dim]``, of each layer keys, then values."""

    prompt_embeddings: Tensor

    def __init__(self, tokens: int, layers: int, width: int, options: Mapping[str, Any], seed: int, name: str) -> None:
        super().__init__()
        self._layers, self._width, self._seed, self._name = layers, width, seed, name
        self._hold(torch.empty(tokens, layers * 2 * width, **options))

    def _hold(self, prefixes: Tensor) -> None:
        self.prompt_embeddings = nn.Parameter(prefixes)

    def reset_parameters(self) -> None:
        """Draw the prefixes from N(0, 1)."""
        fill(self.prompt_embeddings, self._seed, self._name, _normal)

    def forward(self, layer: int) -> Tensor:
        """Return the prefix of a layer ``[tokens, 2 · heads · head_dim]``."""
        return self.prompt_embeddings[:, self._columns(layer)]

    def _columns(self, layer: int) -> slice:
        return slice(layer * 2 * self._width, (layer + 1) * 2 * self._width)


class ProjectedPrefixes(Prefixes):
    """P = MLP(P') (section 4.3): P' ``[tokens, width]``, down ``[hidden, width]``, up ``[layers · 2 · width, hidden]``.

    The buffer ``prompt_embeddings`` is P, brought up to date whenever the state is read: it is all that a file needs.
    """

    def __init__(
        self, tokens: int, layers: int, width: int, options: Mapping[str, Any], seed: int, name: str, hidden: int
    ) -> None:
        super().__init__(tokens, layers, width, options, seed, name)
        self.virtual_tokens = nn.Parameter(torch.empty(tokens, width, **options))
        self.down = nn.Parameter(torch.empty(hidden, width, **options))
        self.down_bias = nn.Parameter(torch.empty(hidden, **options))
        self.up = nn.Parameter(torch.empty(layers * 2 * width, hidden, **options))
        self.up_bias = nn.Parameter(torch.empty(layers * 2 * width, **options))
        self.register_state_dict_pre_hook(_fold)

    def _hold(self, prefixes: Tensor) -> None:
        self.register_buffer("prompt_embeddings", prefixes)

    def reset_parameters(self) -> None:
        """Draw P' from N(0, 1), and the MLP as ``nn.Linear`` does."""
        fill(self.virtual_tokens, self._seed, f"{self._name}.virtual_tokens", _normal)
        for key in ("down", "down_bias", "up", "up_bias"):
            draw = partial(_uniform, getattr(self, key.removesuffix("_bias")).shape[1] ** -0.5)
            fill(getattr(self, key), self._seed, f"{self._name}.{key}", draw)

    def forward(self, layer: int) -> Tensor:
        """Return the prefix of a layer ``[tokens, 2 · heads · head_dim]``."""
        hidden = torch.tanh(functional.linear(self.virtual_tokens, self.down, self.down_bias))
        columns = self._columns(layer)
        return functional.linear(hidden, self.up[columns], self.up_bias[columns])

    def fold(self) -> None:
        """Bring ``prompt_embeddings`` up to date."""
        if not self.prompt_embeddings.is_meta:
            with torch.no_grad():
                self.prompt_embeddings.copy_(torch.cat([self(layer) for layer in range(self._layers)], dim=1))


class PrefixRoom(Adapter):
    """On the decoder: makes room for the prefix in masks and positions."""

    by_row = False

    def __init__(self, prefixes: Prefixes) -> None:
        super().__init__()
        self.prefixes = prefixes
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the initial values of the prefixes of all layers."""
        self.prefixes.reset_parameters()

    def before(
        self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Widen the mask, shift the positions, and give a cache that shows the prefix as taken positions."""
        from transformers import DynamicCache

        from lightning_peft.prefix_cache import ShiftedCache

        named, cache = by_name(base, args, kwargs)
        tokens = len(self.prefixes.prompt_embeddings)
        wanted = named.get("use_cache")
        wanted = getattr(base.config, "use_cache", False) if wanted is None else wanted
        # Activation checkpointing runs a layer twice: a cache would hold its keys twice.
        if base.training and base.is_gradient_checkpointing and torch.is_grad_enabled():
            cache = None
        elif cache is None and wanted:
            cache = DynamicCache(config=base.config)
        mask = named.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 4 and cache is not None and any(cache.is_sliding):
            raise PEFTError(
                "PrefixTuning: a static cache of a model with sliding windows was given; a dynamic cache was expected. "
                "Generate without cache_implementation."
            )
        named["attention_mask"] = widened(mask, tokens)
        if named.get("position_ids") is not None:
            named["position_ids"] = named["position_ids"] + tokens
        return (), {**named, str(cache_parameter(base)): ShiftedCache(cache, tokens, base.config)}

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return the user's own cache in ``output``."""
        given = kwargs[str(cache_parameter(base))]
        return rebuilt(output, lambda value: given.stored if value is given else value)


class Prefix(Adapter):
    """On an attention block: K <- [P_k; K], V <- [P_v; V]."""

    by_row = False

    def __init__(self, prefixes: Prefixes, layer: int, heads: int) -> None:
        super().__init__()
        # In a tuple, so that it is no child: the decoder's adapter has it, and a tensor should have one name.
        self._prefixes, self._layer, self._heads = (prefixes,), layer, heads

    def reset_parameters(self) -> None:
        """Do nothing: the prefixes belong to :class:`PrefixRoom`."""

    def before(
        self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give a cache that puts the prefix before keys and values."""
        from lightning_peft.prefix_cache import PrefixedCache

        named, cache = by_name(base, args, kwargs)
        prefix = self._prefixes[0](self._layer)
        keys, values = prefix.view(len(prefix), 2, self._heads, -1).permute(1, 2, 0, 3)  # [heads, tokens, head_dim]
        return (), {**named, str(cache_parameter(base)): PrefixedCache(cache, keys, values)}


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(PEFTMethod):
    """Trainable keys and values before those of the text, in every layer of a decoder-only transformers model.

    Args:
        num_virtual_tokens: Length of the prefix.
        prefix_projection: Train the prefix as the output of an MLP, which is folded away when an adapter is saved.
        encoder_hidden_size: Width of that MLP; that of the keys (heads · head_dim), if not given.
    """

    name: ClassVar[str] = "prefix_tuning"
    mergeable: ClassVar[bool] = False
    hosts: ClassVar[str] = "decoder-only transformers models"
    count: ClassVar[str] = "2 L l d_kv"

    num_virtual_tokens: int = 10
    prefix_projection: bool = False
    encoder_hidden_size: int | None = None

    def __post_init__(self) -> None:
        require_tokens("PrefixTuning", self.num_virtual_tokens)
        if self.encoder_hidden_size is not None and (self.encoder_hidden_size < 1 or not self.prefix_projection):
            raise PEFTError(
                f"PrefixTuning: encoder_hidden_size={self.encoder_hidden_size!r} was given with prefix_projection="
                f"{self.prefix_projection}; it is the width, at least 1, of the MLP of prefix_projection=True."
            )

    def select(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the decoder and its attention blocks."""
        decoder = find_decoder(model, "PrefixTuning")
        require_room("PrefixTuning", self.num_virtual_tokens, decoder)
        return {decoder.name: decoder.module, **decoder.attention}

    def adapters(self, model: nn.Module, hosts: Mapping[str, nn.Module], seed: int) -> dict[str, Adapter]:
        """Make the prefixes, which the decoder's adapter holds and those of the attention blocks read."""
        decoder = find_decoder(model, "PrefixTuning")
        heads, head_dim = key_value_heads(decoder)
        options = tensor_options(decoder.module)
        sizes = (self.num_virtual_tokens, len(decoder.attention), heads * head_dim)
        prefixes = (
            ProjectedPrefixes(*sizes, options, seed, decoder.name, self.encoder_hidden_size or heads * head_dim)
            if self.prefix_projection
            else Prefixes(*sizes, options, seed, decoder.name)
        )
        made: dict[str, Adapter] = {decoder.name: PrefixRoom(prefixes)}
        made.update({name: Prefix(prefixes, layer, heads) for layer, name in enumerate(decoder.attention)})
        if missing := made.keys() - hosts.keys():
            raise PEFTError(f"PrefixTuning: train_also trains {sorted(missing)[0]!r} whole, which a prefix adapts.")
        return made


def key_value_heads(decoder: Decoder) -> tuple[int, int]:
    """Return the number of key-value heads of every layer, and their width."""
    config = decoder.config
    attention: Any = next(iter(decoder.attention.values()))
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(attention, "num_kv_heads", None) or getattr(config, "num_key_value_heads", None)
    return heads or config.num_attention_heads, width


def _normal(values: Tensor, generator: torch.Generator) -> None:
    values.normal_(generator=generator)


def _uniform(bound: float, values: Tensor, generator: torch.Generator) -> None:
    values.uniform_(-bound, bound, generator=generator)


def _fold(prefixes: ProjectedPrefixes, *args: Any) -> None:
    prefixes.fold()
