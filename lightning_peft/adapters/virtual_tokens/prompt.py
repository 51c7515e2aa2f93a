"""Prompt tuning's adapters on the decoder and on its layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapters.virtual_tokens.infix import Layout, PromptEnd, prompt_ends
from lightning_peft.adapters.virtual_tokens.initial_tokens import start
from lightning_peft.adapters.virtual_tokens.of_call import OfCall
from lightning_peft.adapters.virtual_tokens.virtual_tokens import (
    by_name,
    cache_parameter,
    rebuilt,
    refuse_call,
    refuse_pieces,
)
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.calls import input_of, with_input
from lightning_peft.errors import PEFTError
from lightning_peft.tensors.weights import tensor_options

# The layout, left on a cache that the virtual tokens are in.
_MARK = "_peft_virtual_tokens"
_WORDS = "PromptTuning", "where the virtual tokens were"


class Prompt(Adapter):
    """On the decoder: virtual tokens ``[tokens, hidden]`` before the text and after its prompt.

    What comes out is the text's alone.
    """

    by_row = False

    infix_embeddings: nn.Parameter | None

    def __init__(self, host: nn.Module, prefix: int, values: Tensor, end: PromptEnd) -> None:
        super().__init__()
        (number, width), options = values.shape, tensor_options(host)
        self.prompt_embeddings = nn.Parameter(torch.empty(prefix, width, **options))
        infix = nn.Parameter(torch.empty(number - prefix, width, **options)) if number > prefix else None
        self.register_parameter("infix_embeddings", infix)
        # In a tuple, so that it is no child.
        self._start, self._end = values, (end,)
        self._of_call = OfCall(*_WORDS)
        self.reset_parameters()

    @property
    def layout(self) -> Layout | None:
        """Where the virtual tokens are in the present call, if they are in it and not in the cache."""
        layout: Layout | None = self._of_call.value
        return layout

    def __setstate__(self, state: dict[str, Any]) -> None:
        # One that an older version pickled has none.
        super().__setstate__({**state, "_of_call": OfCall(*_WORDS)})

    def reset_parameters(self) -> None:
        """Set the virtual tokens to what they start as."""
        start("PromptTuning", self.prompt_embeddings, self._start[: len(self.prompt_embeddings)])
        if self.infix_embeddings is not None:
            start("PromptTuning", self.infix_embeddings, self._start[len(self.prompt_embeddings) :])

    def before(
        self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Put the virtual tokens in, unless they are in the cache; widen the mask, shift positions."""
        refuse_pieces("PromptTuning", self.prompt_embeddings)
        named, cache = by_name(base, args, kwargs)
        labels = self._end[0].labels()
        _refuse_call(base, named, cache, len(self._start))
        if cache is not None and cache.get_seq_length() > 0:
            begun, layout = None, self._continued(cache, named)
        else:
            begun = layout = self._begun(named, labels)
            if cache is not None:
                setattr(cache, _MARK, layout)
        self._of_call.value = begun
        mask, positions = named.get("attention_mask"), named.get("position_ids")
        if mask is not None:
            named["attention_mask"] = layout.widened(mask, mask.new_ones(len(mask), layout.added))
        if positions is not None:
            named["position_ids"] = positions + layout.added if begun is None else layout.positions(positions)
        if begun is not None:
            embeds = named.get("inputs_embeds")
            embeds = base.get_input_embeddings()(named["input_ids"]) if embeds is None else embeds
            parts: list[Tensor] = [p for p in (self.prompt_embeddings, self.infix_embeddings) if p is not None]
            virtual = torch.cat(parts).expand(len(embeds), -1, -1)
            named |= {"input_ids": None, "inputs_embeds": layout.widened(embeds, virtual)}
        return (), {**named, str(cache_parameter(base)): cache}

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return ``output`` without the virtual tokens' hidden states; attention maps keep them."""
        layout = self.layout
        if layout is None:
            return output
        self._of_call.follow(output[0])
        length = kwargs["inputs_embeds"].shape[1]

        def cut(value: Any) -> Any:
            if isinstance(value, Tensor):
                return layout.narrowed(value) if value.dim() == 3 and value.shape[1] == length else value
            if isinstance(value, tuple | list):
                return type(value)(cut(part) for part in value)
            if hasattr(value, "get_seq_length"):
                setattr(value, _MARK, layout)
            return value

        return rebuilt(output, cut)

    def _begun(self, named: Mapping[str, Any], labels: Tensor | None) -> Layout:
        """Return the layout for a text that begins with this call."""
        text = _text(named)
        prefix, infix = len(self.prompt_embeddings), len(self._start) - len(self.prompt_embeddings)
        if not infix:
            return Layout(prefix, infix, torch.zeros(len(text), dtype=torch.long, device=text.device))
        mask = named.get("attention_mask")
        mask = torch.ones(text.shape[:2], device=text.device) if mask is None else mask
        if labels is not None and labels.shape != mask.shape:
            raise PEFTError(
                f"PromptTuning: labels of shape {list(labels.shape)} were given with a text of {list(mask.shape)}; one "
                "label for each token was expected."
            )
        return Layout(prefix, infix, prompt_ends(mask, labels))

    def _continued(self, cache: Any, named: Mapping[str, Any]) -> Layout:
        """Return the layout of a text that goes on, all of whose virtual tokens are in the cache.

        Raises:
            PEFTError: The cache was filled without them, or does not go with the mask, or they are in other places in
                each row, of which the order is not known any more: beam search changes it.
        """
        layout: Layout | None = getattr(cache, _MARK, None)
        text, mask = _text(named), named.get("attention_mask")
        held, added = cache.get_seq_length(), len(self._start)
        fits = mask is None or mask.shape[-1] + added == held + text.shape[1]
        if layout is None or layout.added != added or not fits:
            raise PEFTError(
                f"PromptTuning: a cache of {held} tokens was given that was not filled with the model's {added} "
                "virtual tokens in it, or does not go with the attention mask. Begin with an empty cache."
            )
        if bool((layout.ends != layout.ends[0]).any()):
            raise PEFTError(
                "PromptTuning: a cache of prompts that end in different columns was given. Pad them on the left to go "
                "on from infix tokens."
            )
        return replace(layout, ends=layout.ends[:1].expand(len(text)))


class Activations(Adapter):
    """On a layer: it is given trainable activations ``[tokens, hidden]`` in the virtual tokens' places."""

    by_row = False

    def __init__(self, host: nn.Module, prompt: Prompt, values: Tensor) -> None:
        super().__init__()
        self.activations = nn.Parameter(torch.empty(values.shape, **tensor_options(host)))
        self._prompt, self._start = (prompt,), values
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the activations to what they start as."""
        start("PromptTuning", self.activations, self._start)

    def before(
        self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Replace what the layer before made of the virtual tokens."""
        layout = self._prompt[0].layout
        if layout is None:
            return args, kwargs
        hidden = input_of(args, kwargs)
        return with_input(args, kwargs, layout.replaced(hidden, self.activations.expand(len(hidden), -1, -1)))


def _text(named: Mapping[str, Any]) -> Tensor:
    """Return the token ids ``[batch, tokens]``, or the embeddings."""
    text: Tensor = named["inputs_embeds"] if named.get("input_ids") is None else named["input_ids"]
    return text


def _refuse_call(base: Any, named: Mapping[str, Any], cache: Any, number: int) -> None:
    """Refuse what virtual tokens have no room in."""
    refuse_call("PromptTuning", base, named, cache, number, cached=True)
    mask = named.get("attention_mask")
    if cache is not None and cache.is_compileable:
        raise PEFTError(
            "PromptTuning: a static cache was given, which has no room for virtual tokens; a dynamic cache was "
            "expected. Generate without cache_implementation."
        )
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise PEFTError(
            "PromptTuning: an attention mask "
            + (f"of shape {list(mask.shape)}" if isinstance(mask, Tensor) else f"that is a {type(mask).__name__}")
            + " was given; one of shape [batch, tokens] was expected."
        )
    if named.get("token_type_ids") is not None:
        raise PEFTError("PromptTuning: token_type_ids were given; virtual tokens have no type. Leave them out.")
