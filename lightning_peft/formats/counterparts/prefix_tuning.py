"""Prefix tuning in HF PEFT's format: one tensor, the prefixes of all layers, without the MLP that made them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from lightning_peft.adapters.virtual_tokens.virtual_tokens import find_decoder
from lightning_peft.core.adapter import CHILD
from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.view import ModelView
from lightning_peft.formats.counterpart import Counterpart, Shapes
from lightning_peft.formats.counterparts.prompt_learning import KEYS, common_config, tokens_in
from lightning_peft.methods.prefix_tuning import PrefixTuning, key_value_heads


class PrefixTuningInHF(Counterpart):
    """``PrefixTuning``."""

    method = PrefixTuning
    peft_type = "PREFIX_TUNING"
    keys = KEYS | {"encoder_hidden_size", "prefix_projection"}
    parameters: ClassVar[Mapping[str, str]] = {"prompt_embeddings": "prefixes.prompt_embeddings"}

    def writes(self, method: PEFTMethod) -> bool:
        """Whether texts stand behind the prefix."""
        return isinstance(method, PrefixTuning) and not method.keep_positions

    def config(
        self, root: ModelView, method: PrefixTuning, hosts: Iterable[str], chosen: Iterable[str]
    ) -> dict[str, Any]:
        """Return the sizes of the prefix."""
        decoder = find_decoder(root, "PrefixTuning")
        heads, head_dim = key_value_heads(decoder)
        return {
            **common_config(decoder, method.num_virtual_tokens),
            "token_dim": heads * head_dim,
            "num_attention_heads": heads,
            "encoder_hidden_size": heads * head_dim,
            "prefix_projection": False,
        }

    def read(self, root: ModelView, config: Mapping[str, Any], shapes: Shapes, source: str) -> PEFTMethod:
        """Return the prefix tuning, without an MLP: files hold none."""
        return PrefixTuning(num_virtual_tokens=tokens_in(config, shapes, source))

    def names(
        self, root: ModelView, method: PrefixTuning, hosts: Iterable[str], chosen: Iterable[str]
    ) -> dict[str, str]:
        """Return the one tensor."""
        decoder = find_decoder(root, "PrefixTuning")
        return {file: f"{decoder.name}.{CHILD}.{name}".lstrip(".") for file, name in self.parameters.items()}

    def owns(self, name: str) -> bool:
        """Whether it is the one tensor."""
        return name in self.parameters
