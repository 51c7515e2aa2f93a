"""What prefix and prompt tuning have in common in HF PEFT's format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_peft.adapters.virtual_tokens.virtual_tokens import Decoder
from lightning_peft.errors import PEFTError
from lightning_peft.formats.counterpart import Shapes

TENSOR = "prompt_embeddings"
KEYS = frozenset({"num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"})
"""Of the configurations of both."""


def common_config(decoder: Decoder, tokens: int) -> dict[str, Any]:
    """Return the keys of ``adapter_config.json`` that both have."""
    return {
        "num_virtual_tokens": tokens,
        "num_layers": decoder.config.num_hidden_layers,
        "num_transformer_submodules": 1,
    }


def tokens_in(config: Mapping[str, Any], shapes: Shapes, source: str) -> int:
    """Return the number of virtual tokens in a file.

    Raises:
        PEFTError: The tensor is missing, or has another number of rows than the configuration says.
    """
    shape, tokens = shapes.get(TENSOR, ()), config.get("num_virtual_tokens")
    if len(shape) != 2 or shape[0] != tokens:
        raise PEFTError(
            f"{source}: its tensor {TENSOR!r} has shape {list(shape)}; one with a row for each of "
            f"num_virtual_tokens={tokens!r} was expected. It is damaged."
        )
    return shape[0]
