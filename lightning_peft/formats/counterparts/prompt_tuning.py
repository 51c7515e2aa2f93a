"""Prompt tuning in HF PEFT's format: one tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from lightning_peft.adapters.virtual_tokens.virtual_tokens import find_decoder
from lightning_peft.core.adapter import CHILD
from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.view import ModelView
from lightning_peft.formats.counterpart import Counterpart, Shapes
from lightning_peft.formats.counterparts.prompt_learning import KEYS, common_config, tokens_in
from lightning_peft.methods.prompt_tuning import PromptTuning


class PromptTuningInHF(Counterpart):
    """``PromptTuning``."""

    method = PromptTuning
    peft_type = "PROMPT_TUNING"
    keys = KEYS | {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"}
    parameters: ClassVar[Mapping[str, str]] = {"prompt_embeddings": "prompt_embeddings"}

    def writes(self, method: PEFTMethod) -> bool:
        """Whether HF PEFT has it: not with infix tokens, nor in every layer."""
        assert isinstance(method, PromptTuning)
        return not method.num_infix_tokens and not method.every_layer

    def config(
        self, root: ModelView, method: PromptTuning, hosts: Iterable[str], chosen: Iterable[str]
    ) -> dict[str, Any]:
        """Return the sizes of the prompt."""
        decoder = find_decoder(root, "PromptTuning")
        embedding: Any = decoder.module.get_input_embeddings()  # type: ignore[operator]
        return {
            **common_config(decoder, method.num_virtual_tokens),
            "token_dim": embedding.embedding_dim,
            "num_attention_heads": decoder.config.num_attention_heads,
            # What it started from is of no use to who reads it: HF PEFT would want a tokenizer.
            "prompt_tuning_init": "RANDOM",
        }

    def read(self, root: ModelView, config: Mapping[str, Any], shapes: Shapes, source: str) -> PEFTMethod:
        """Return the prompt tuning."""
        find_decoder(root, "PromptTuning")
        return PromptTuning(num_virtual_tokens=tokens_in(config, shapes, source))

    def names(
        self, root: ModelView, method: PromptTuning, hosts: Iterable[str], chosen: Iterable[str]
    ) -> dict[str, str]:
        """Return the one tensor."""
        decoder = find_decoder(root, "PromptTuning")
        return {file: f"{decoder.name}.{CHILD}.{name}".lstrip(".") for file, name in self.parameters.items()}

    def owns(self, name: str) -> bool:
        """Whether it is the one tensor."""
        return name in self.parameters


class PTuningInHF(PromptTuningInHF):
    """``P_TUNING``: its files hold the prompt that its network made, and not the network."""

    method = PromptTuning
    peft_type = "P_TUNING"
    keys = KEYS | {"encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"}

    def writes(self, method: PEFTMethod) -> bool:
        """Never: what is read is a prompt like any other."""
        return False
