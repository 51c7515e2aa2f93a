"""Prompt tuning: The Power of Scale for Parameter-Efficient Prompt Tuning (Lester et al., 2021), arXiv:2104.08691.

With ``num_infix_tokens`` it is the prefix-embedding tuning (PreEmbed), with ``every_layer`` the prefix-layer tuning
(PreLayer) of LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021), arXiv:2106.09685, section 5.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_peft.adapters.virtual_tokens.infix import PromptEnd
from lightning_peft.adapters.virtual_tokens.initial_tokens import (
    embedded,
    initial_ids,
    observed,
    require_one_start,
    without_start,
)
from lightning_peft.adapters.virtual_tokens.prompt import Activations, Prompt
from lightning_peft.adapters.virtual_tokens.virtual_tokens import Decoder, find_decoder, require_room, require_tokens
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.calls import recorded_inputs
from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.tensors.seeding import generator_of


@dataclass(frozen=True, kw_only=True)
class PromptTuning(PEFTMethod):
    """Trainable embeddings before and within the text of a decoder-only transformers model.

    Outputs are those of the text. A loss over them does not count the text's first token as predicted by the prompt.

    Infix tokens stand after the prompt of each row: before its first label other than -100 if the model is called with
    ``labels`` (or within :func:`lightning_peft.adapters.virtual_tokens.infix.answers`), else after its last token that
    is not padding. The answer's first token is predicted from the last of them.

    Args:
        num_virtual_tokens: Number of trainable embeddings before the text.
        num_infix_tokens: Number of trainable embeddings after the prompt.
        every_layer: Give every layer trainable activations in the virtual tokens' places, in place of what the layer
            before made of them. What the last layer makes of them stays: the answer begins with it.
        init: What they are at first: rows of the embedding drawn from the ``vocabulary``, and what the layers make of
            them, or ``random`` from N(0, 1).
        init_ids: Token ids of a text to take them from instead; it is repeated or cut to the length.
        init_text: That text itself.
        tokenizer_name_or_path: Where its tokenizer is; where the model comes from, if not given.
    """

    name: ClassVar[str] = "prompt_tuning"
    mergeable: ClassVar[bool] = False
    hosts: ClassVar[str] = "decoder-only transformers models"
    count: ClassVar[str] = "l d; in every layer L l d"

    num_virtual_tokens: int = 20
    num_infix_tokens: int = 0
    every_layer: bool = False
    init: Literal["vocabulary", "random"] = "vocabulary"
    init_ids: list[int] | None = None
    init_text: str | None = None
    tokenizer_name_or_path: str | None = None

    def __post_init__(self) -> None:
        require_tokens("PromptTuning", self.num_virtual_tokens)
        if self.num_infix_tokens != 0:
            require_tokens("PromptTuning", self.num_infix_tokens, "num_infix_tokens")
        if self.init not in ("vocabulary", "random"):
            raise PEFTError(f"PromptTuning: init={self.init!r} was given; it is 'vocabulary' or 'random'.")
        require_one_start("PromptTuning", self.init_ids, self.init_text, self.tokenizer_name_or_path)
        if self.init == "random" and (self.init_ids or self.init_text):
            raise PEFTError("PromptTuning: init='random' was given with a text to start from. Give one of the two.")

    @property
    def reads_weights(self) -> bool:
        """Whether the virtual tokens start from rows of the embedding."""
        return self.init == "vocabulary"

    def config(self) -> dict[str, Any]:
        """Return the hyper-parameters as plain JSON types, without the text that was started from."""
        return without_start(super().config())

    def select(self, model: ModelView) -> dict[str, nn.Module]:
        """Return the decoder, and what else has to know of the virtual tokens."""
        decoder = find_decoder(model, "PromptTuning")
        require_room("PromptTuning", self.num_virtual_tokens + self.num_infix_tokens, decoder)
        around: Any = model.modules[decoder.around]
        knows_labels = around is not decoder.module and around.get_output_embeddings() is not None
        names = [decoder.around] if self.num_infix_tokens and knows_labels else []
        names += [decoder.name, *(decoder.layers()[1:] if self.every_layer else [])]
        return {name: model.modules[name] for name in names}

    def adapters(self, model: ModelView, hosts: Mapping[str, nn.Module], seed: int) -> dict[str, Adapter]:
        """Make the virtual tokens."""
        if missing := self.select(model).keys() - hosts.keys():
            raise PEFTError(f"PromptTuning: train_also trains {sorted(missing)[0]!r} whole, which a prompt adapts.")
        decoder = find_decoder(model, "PromptTuning")
        start = self._start(decoder, seed)
        end = PromptEnd()
        prompt = Prompt(decoder.module, self.num_virtual_tokens, start, end)
        made: dict[str, Adapter] = {decoder.around: end} if decoder.around in hosts else {}
        made[decoder.name] = prompt
        if self.every_layer:
            states = self._layer_starts(model, decoder, start, seed)
            made |= {name: Activations(hosts[name], prompt, states[name]) for name in decoder.layers()[1:]}
        return made

    def _start(self, decoder: Decoder, seed: int) -> Tensor:
        """Return the initial embeddings ``[prefix + infix, hidden]``."""
        embedding: Any = decoder.module.get_input_embeddings()  # type: ignore[operator]
        number, draw = self.num_virtual_tokens + self.num_infix_tokens, generator_of(seed, decoder.name)
        if self.init == "random":
            return torch.randn(number, embedding.embedding_dim, generator=draw)
        given = (self.init_ids, self.init_text, self.tokenizer_name_or_path)
        ids = initial_ids("PromptTuning", decoder, number, *given)
        drawn = torch.randint(embedding.num_embeddings, (number,), generator=draw) if ids is None else torch.tensor(ids)
        return embedded(decoder, drawn)

    def _layer_starts(self, model: ModelView, decoder: Decoder, start: Tensor, seed: int) -> dict[str, Tensor]:
        """Return the initial activations ``[prefix + infix, hidden]`` that each layer but the first is given."""
        layers, shape = decoder.layers()[1:], (len(start), decoder.config.hidden_size)
        if self.init == "random":
            return {name: torch.randn(shape, generator=generator_of(seed, name)) for name in layers}
        inputs = start.to(next(decoder.module.parameters()))[None]
        with recorded_inputs({name: model.modules[name] for name in layers}) as states:
            seen = observed("PromptTuning", model, decoder, inputs_embeds=inputs, use_cache=False)
        if seen is None:
            return dict.fromkeys(layers, torch.empty(shape, device="meta"))
        return {name: states[name][0] for name in layers}
