"""Prefix-Tuning: Optimizing Continuous Prompts for Generation (Li & Liang, 2021), arXiv:2101.00190.

Section 4.2 (keys and values before those of the text, in every layer) and 4.3 (reparameterisation by an MLP).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.adapters.virtual_tokens.initial_tokens import (
    initial_ids,
    observed,
    require_one_start,
    without_start,
)
from lightning_peft.adapters.virtual_tokens.prefixes import Prefixes, ProjectedPrefixes
from lightning_peft.adapters.virtual_tokens.virtual_tokens import (
    Decoder,
    by_name,
    cache_of,
    cache_parameter,
    find_decoder,
    rebuilt,
    refuse_call,
    refuse_pieces,
    require_room,
    require_tokens,
    widened,
)
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.tensors.weights import tensor_options


class PrefixRoom(Adapter):
    """On the decoder: makes room for the prefix in masks, and in positions unless the text is to keep its own."""

    by_row = False

    def __init__(self, prefixes: Prefixes, keep_positions: bool) -> None:
        super().__init__()
        self.prefixes, self._keep_positions = prefixes, keep_positions
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the initial values of the prefixes of all layers."""
        self.prefixes.reset_parameters()

    def before(
        self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Widen the mask, shift the positions, and give a cache that shows the prefix as taken positions."""
        from transformers import DynamicCache

        from lightning_peft.adapters.virtual_tokens.prefix_cache import ShiftedCache

        refuse_pieces("PrefixTuning", next(self.prefixes.parameters()))
        named, cache = by_name(base, args, kwargs)
        tokens = len(self.prefixes.prompt_embeddings)
        wanted = named.get("use_cache")
        wanted = getattr(base.config, "use_cache", False) if wanted is None else wanted
        shift = 0 if self._keep_positions else tokens
        refuse_call("PrefixTuning", base, named, cache, shift, cached=False)
        if cache is None and wanted:
            cache = DynamicCache(config=base.config)
        mask = named.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 4 and cache is not None and any(cache.is_sliding):
            raise PEFTError(
                "PrefixTuning: a static cache of a model with sliding windows was given; a dynamic cache was expected. "
                "Generate without cache_implementation."
            )
        named["attention_mask"] = widened(mask, tokens)
        if named.get("position_ids") is not None:
            named["position_ids"] = named["position_ids"] + shift
        elif self._keep_positions:
            named["position_ids"] = _own_positions(named, cache)
        return (), {**named, str(cache_parameter(base)): ShiftedCache(cache, tokens, base.config)}

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return the user's own cache in ``output``."""
        given = kwargs[str(cache_parameter(base))]
        return rebuilt(output, lambda value: given.stored if value is given else value)


class Prefix(Adapter):
    """On an attention block: K <- [P_k; K], V <- [P_v; V]."""

    by_row = False
    of_heads = True

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
        from lightning_peft.adapters.virtual_tokens.prefix_cache import PrefixedCache

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
        keep_positions: The text keeps its positions, as in AdapterHub's package, instead of standing behind the prefix,
            as in the paper and HF PEFT. Files are in this package's own format then.
        init_ids: Token ids of a text from whose keys and values the prefix starts, as if the text stood before every
            text; it is repeated or cut to the length. By default the prefix is drawn from N(0, 1).
        init_text: That text itself.
        tokenizer_name_or_path: Where its tokenizer is; where the model comes from, if not given.
    """

    name: ClassVar[str] = "prefix_tuning"
    mergeable: ClassVar[bool] = False
    hosts: ClassVar[str] = "decoder-only transformers models"
    count: ClassVar[str] = "2 L l d_kv"

    num_virtual_tokens: int = 10
    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    keep_positions: bool = False
    init_ids: list[int] | None = None
    init_text: str | None = None
    tokenizer_name_or_path: str | None = None

    def __post_init__(self) -> None:
        require_tokens("PrefixTuning", self.num_virtual_tokens)
        if self.encoder_hidden_size is not None and (self.encoder_hidden_size < 1 or not self.prefix_projection):
            raise PEFTError(
                f"PrefixTuning: encoder_hidden_size={self.encoder_hidden_size!r} was given with prefix_projection="
                f"{self.prefix_projection}; it is the width, at least 1, of the MLP of prefix_projection=True."
            )
        require_one_start("PrefixTuning", self.init_ids, self.init_text, self.tokenizer_name_or_path)
        if self.keep_positions and (self.init_ids or self.init_text):
            raise PEFTError(
                "PrefixTuning: a text to start from was given with keep_positions=True; its keys and values are those "
                "of a text that stands before others, in positions of its own. Drop one of the two."
            )
        if self.prefix_projection and (self.init_ids or self.init_text):
            raise PEFTError(
                "PrefixTuning: a text to start from was given with prefix_projection=True; the MLP that gives the keys "
                "and values cannot start from them. Drop one of the two."
            )

    @property
    def reads_weights(self) -> bool:
        """Whether the prefix starts from what the model makes of a text."""
        return bool(self.init_ids or self.init_text)

    def config(self) -> dict[str, Any]:
        """Return the hyper-parameters as plain JSON types, without the text that was started from."""
        return without_start(super().config())

    def select(self, model: ModelView) -> dict[str, nn.Module]:
        """Return the decoder and its attention blocks."""
        decoder = find_decoder(model, "PrefixTuning")
        if not self.keep_positions:
            require_room("PrefixTuning", self.num_virtual_tokens, decoder)
        elif "position_ids" not in signature(type(decoder.module).forward).parameters:
            raise PEFTError(
                f"PrefixTuning: keep_positions=True was given, but a {type(decoder.module).__name__} takes no "
                "position_ids: it works positions out for itself. Leave it out."
            )
        return {decoder.name: decoder.module, **decoder.attention}

    def adapters(self, model: ModelView, hosts: Mapping[str, nn.Module], seed: int) -> dict[str, Adapter]:
        """Make the prefixes, which the decoder's adapter holds and those of the attention blocks read."""
        decoder = find_decoder(model, "PrefixTuning")
        heads, head_dim = key_value_heads(decoder)
        sizes = (self.num_virtual_tokens, len(decoder.attention), heads * head_dim)
        given = (*sizes, tensor_options(decoder.module), seed, decoder.name)
        prefixes = (
            ProjectedPrefixes(*given, self.encoder_hidden_size or heads * head_dim)
            if self.prefix_projection
            else Prefixes(*given, self._start(model, decoder, sizes))
        )
        made: dict[str, Adapter] = {decoder.name: PrefixRoom(prefixes, self.keep_positions)}
        made.update({name: Prefix(prefixes, layer, heads) for layer, name in enumerate(decoder.attention)})
        if missing := made.keys() - hosts.keys():
            raise PEFTError(f"PrefixTuning: train_also trains {sorted(missing)[0]!r} whole, which a prefix adapts.")
        return made

    def _start(self, model: ModelView, decoder: Decoder, sizes: tuple[int, int, int]) -> Tensor | None:
        """Return the keys and values of the text to start from, as :class:`Prefixes` has them, if there is one."""
        given = (self.init_ids, self.init_text, self.tokenizer_name_or_path)
        ids = initial_ids("PrefixTuning", decoder, self.num_virtual_tokens, *given)
        if ids is None:
            return None
        inputs = torch.tensor([ids], device=next(decoder.module.parameters()).device)
        seen = observed("PrefixTuning", model, decoder, input_ids=inputs, use_cache=True)
        tokens, layers, width = sizes
        if seen is None:
            return torch.empty(tokens, layers * 2 * width, device="meta")
        held = [states for layer in cache_of(seen).layers for states in (layer.keys, layer.values)]
        if any(states.shape[2] != tokens or states[0, :, 0].numel() != width for states in held):
            raise PEFTError(
                f"PrefixTuning: the model keeps keys and values of shape {list(held[0].shape)} of {tokens} tokens, and "
                f"a prefix needs {width} values of each token. Take fewer tokens than a sliding window has, or start "
                "at random."
            )
        return torch.stack(held).squeeze(1).permute(2, 0, 1, 3).reshape(tokens, -1)


def _own_positions(named: Mapping[str, Any], cache: Any) -> Tensor:
    """Return the positions of a text without a prefix, ``[1, tokens]``, behind what ``cache`` holds."""
    text = named["inputs_embeds"] if named.get("input_ids") is None else named["input_ids"]
    held = 0 if cache is None else cache.get_seq_length()
    return torch.arange(text.shape[1], device=text.device)[None] + held


def key_value_heads(decoder: Decoder) -> tuple[int, int]:
    """Return the number of key-value heads of every layer, and their width."""
    config = decoder.config
    attention: Any = next(iter(decoder.attention.values()))
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(attention, "num_kv_heads", None) or getattr(config, "num_key_value_heads", None)
    return heads or config.num_attention_heads, width
