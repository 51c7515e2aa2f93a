"""Prompt tuning: The Power of Scale for Parameter-Efficient Prompt Tuning (Lester et al., 2021), arXiv:2104.08691.

It is the prefix-embedding tuning (PreEmbed) of LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021),
arXiv:2106.09685, section 5.1, without infix tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_peft.adapter import Adapter
from lightning_peft.errors import PEFTError
from lightning_peft.method import PEFTMethod
from lightning_peft.seeding import fill
from lightning_peft.virtual_tokens import (
    by_name,
    cache_parameter,
    find_decoder,
    rebuilt,
    require_room,
    require_tokens,
    widened,
)
from lightning_peft.weights import tensor_options

# Left on a cache that the virtual tokens are in.
_MARK = "_peft_virtual_tokens"


class Prompt(Adapter):
    """On the decoder: virtual tokens ``[tokens, hidden]`` before the text; what comes out is the text's alone."""

    by_row = False

    def __init__(self, host: Any, tokens: int, init: str, ids: list[int] | None, seed: int, name: str) -> None:
        super().__init__()
        embedding = host.get_input_embeddings()
        self.prompt_embeddings = nn.Parameter(torch.empty(tokens, embedding.embedding_dim, **tensor_options(host)))
        # In a tuple, so that it is no child.
        self._embedding, self._init, self._ids, self._seed, self._name = (embedding,), init, ids, seed, name
        self._inserted = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the virtual tokens from N(0, 1), or look them up among the embeddings."""
        fill(self.prompt_embeddings, self._seed, self._name, self._draw)

    def _draw(self, values: Tensor, generator: torch.Generator) -> None:
        if self._init == "random":
            values.normal_(generator=generator)
            return
        embedding = self._embedding[0]
        ids = torch.tensor(self._ids or torch.randint(embedding.num_embeddings, (len(values),), generator=generator))
        # A text of another length is repeated or cut, as in HF PEFT.
        ids = ids.repeat(-(-len(values) // len(ids)))[: len(values)]
        values.copy_(embedding(ids.to(embedding.weight.device)))

    def before(
        self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Put the virtual tokens before the text, unless they are in the cache; widen the mask, shift positions."""
        named, cache = by_name(base, args, kwargs)
        tokens = len(self.prompt_embeddings)
        self._inserted = cache is None or cache.get_seq_length() == 0
        mask, positions = named.get("attention_mask"), named.get("position_ids")
        if not self._inserted:
            _refuse_other_cache(cache, tokens, named)
        elif cache is not None:
            if cache.is_compileable:
                raise PEFTError(
                    "PromptTuning: a static cache was given, which has no room for virtual tokens; a dynamic cache was "
                    "expected. Generate without cache_implementation."
                )
            setattr(cache, _MARK, tokens)
        if isinstance(mask, Tensor) and mask.dim() != 2:
            raise PEFTError(
                f"PromptTuning: an attention mask of shape {list(mask.shape)} was given; one of shape [batch, tokens] "
                "was expected."
            )
        named["attention_mask"] = widened(mask, tokens)
        if positions is not None:
            first = torch.arange(tokens, device=positions.device).expand(*positions.shape[:-1], -1)
            shifted = positions + tokens
            named["position_ids"] = torch.cat([first, shifted], dim=-1) if self._inserted else shifted
        if self._inserted:
            named = self._with_prompt(base, named)
        return (), {**named, str(cache_parameter(base)): cache}

    def forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return ``output`` without the virtual tokens' hidden states; attention maps keep them."""
        if not self._inserted:
            return output
        tokens = len(self.prompt_embeddings)
        length = kwargs["inputs_embeds"].shape[1]

        def cut(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value[:, tokens:] if value.dim() == 3 and value.shape[1] == length else value
            if isinstance(value, tuple | list):
                return type(value)(cut(part) for part in value)
            if hasattr(value, "get_seq_length"):
                setattr(value, _MARK, tokens)
            return value

        return rebuilt(output, cut)

    def _with_prompt(self, base: Any, named: dict[str, Any]) -> dict[str, Any]:
        if named.get("token_type_ids") is not None:
            raise PEFTError("PromptTuning: token_type_ids were given; virtual tokens have no type. Leave them out.")
        embeds = named.get("inputs_embeds")
        if embeds is None:
            embeds = base.get_input_embeddings()(named["input_ids"])
        prompt = self.prompt_embeddings.to(embeds.dtype).expand(len(embeds), -1, -1)
        return {**named, "input_ids": None, "inputs_embeds": torch.cat([prompt, embeds], dim=1)}


@dataclass(frozen=True, kw_only=True)
class PromptTuning(PEFTMethod):
    """Trainable embeddings before the text of a decoder-only transformers model.

    Outputs are those of the text. A loss over them does not count the text's first token as predicted by the prompt.

    Args:
        num_virtual_tokens: Number of trainable embeddings.
        init: What they are at first: rows of the embedding drawn from the ``vocabulary``, or ``random`` from N(0, 1).
        init_ids: Token ids of a text to take them from instead; it is repeated or cut to the length.
    """

    name: ClassVar[str] = "prompt_tuning"
    mergeable: ClassVar[bool] = False
    hosts: ClassVar[str] = "decoder-only transformers models"
    count: ClassVar[str] = "l d"
    free: ClassVar[frozenset[str]] = PEFTMethod.free | {"init_ids"}

    num_virtual_tokens: int = 20
    init: Literal["vocabulary", "random"] = "vocabulary"
    init_ids: list[int] | None = None

    def __post_init__(self) -> None:
        require_tokens("PromptTuning", self.num_virtual_tokens)
        if self.init not in ("vocabulary", "random"):
            raise PEFTError(f"PromptTuning: init={self.init!r} was given; it is 'vocabulary' or 'random'.")
        if self.init_ids is not None and (not self.init_ids or self.init != "vocabulary"):
            raise PEFTError(
                f"PromptTuning: init_ids={self.init_ids!r} was given with init={self.init!r}; it is a list of at least "
                "one token id, with init='vocabulary'."
            )

    def select(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the decoder."""
        decoder = find_decoder(model, "PromptTuning")
        require_room("PromptTuning", self.num_virtual_tokens, decoder)
        return {decoder.name: decoder.module}

    def adapter(self, name: str, module: Any, seed: int) -> Prompt:
        """Make the virtual tokens."""
        size = module.get_input_embeddings().num_embeddings
        if unknown := [token for token in self.init_ids or () if not 0 <= token < size]:
            raise PEFTError(f"PromptTuning: init_ids has {unknown[0]}, but the model has {size} tokens.")
        return Prompt(module, self.num_virtual_tokens, self.init, self.init_ids, seed, name)


def _refuse_other_cache(cache: Any, tokens: int, named: Mapping[str, Any]) -> None:
    """Refuse a cache that is filled without these virtual tokens, or does not fit the mask."""
    ids, mask = named.get("input_ids"), named.get("attention_mask")
    queries = (named["inputs_embeds"] if ids is None else ids).shape[1]
    fits = not isinstance(mask, Tensor) or mask.shape[-1] + tokens == cache.get_seq_length() + queries
    if getattr(cache, _MARK, 0) != tokens or not fits:
        raise PEFTError(
            f"PromptTuning: a cache of {cache.get_seq_length()} tokens was given that was not filled with the model's "
            f"{tokens} virtual tokens before them, or does not go with the attention mask. Begin with an empty cache."
        )
