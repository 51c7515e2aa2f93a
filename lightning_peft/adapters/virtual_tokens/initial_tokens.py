"""What virtual tokens start as: tokens of the vocabulary or of a text, and what the model makes of them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from lightning_peft.adapters.virtual_tokens.virtual_tokens import Decoder
from lightning_peft.core.contexts import disable, evaluating
from lightning_peft.core.registry import registries
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.tensors.sharding import in_zero_pieces, whole, write


def without_start(config: dict[str, Any]) -> dict[str, Any]:
    """Return a method's configuration without the text that it starts from: loading values takes no tokenizer."""
    return {
        key: value for key, value in config.items() if key not in ("init_ids", "init_text", "tokenizer_name_or_path")
    }


def require_one_start(method: str, ids: list[int] | None, text: str | None, tokenizer: str | None) -> None:
    """Check that tokens to start from are given in one way, if at all.

    Raises:
        PEFTError: They are not.
    """
    if ids is not None and (not ids or text is not None):
        raise PEFTError(
            f"{method}: init_ids={ids!r} was given with init_text={text!r}; a list of at least one token id, or a text "
            "was expected."
        )
    if text is not None and not text:
        raise PEFTError(f"{method}: init_text='' was given; a text was expected.")
    if tokenizer is not None and text is None:
        raise PEFTError(f"{method}: tokenizer_name_or_path={tokenizer!r} was given without init_text to read with it.")


def initial_ids(
    method: str, decoder: Decoder, number: int, ids: list[int] | None, text: str | None, tokenizer: str | None
) -> list[int] | None:
    """Return ``number`` token ids, of a text that is repeated or cut to that length, as in HF PEFT.

    Args:
        method: Name of the method, for errors.
        decoder: What is going to read them.
        number: How many.
        ids: Token ids of the text, or
        text: the text, if either is given.
        tokenizer: Where its tokenizer is; by default where the model comes from.

    Raises:
        PEFTError: There is no such tokenizer, it makes nothing of the text, or the model has not a token.
    """
    ids = ids if text is None else _tokenised(method, decoder, text, tokenizer)
    if ids is None:
        return None
    size = _embedding(decoder).num_embeddings
    if unknown := [token for token in ids if not 0 <= token < size]:
        raise PEFTError(
            f"{method}: the text to start from has the token id {unknown[0]}, but the model has {size} tokens. Use its "
            "own tokenizer."
        )
    return (ids * -(-number // len(ids)))[:number]


def _tokenised(method: str, decoder: Decoder, text: str, tokenizer: str | None) -> list[int]:
    from transformers import AutoTokenizer

    path = tokenizer or getattr(decoder.config, "_name_or_path", "")
    if not path:
        raise PEFTError(
            f"{method}: init_text was given, but the model does not say where its tokenizer is. Name it in "
            "tokenizer_name_or_path."
        )
    try:
        ids = AutoTokenizer.from_pretrained(path, trust_remote_code=False)(text)["input_ids"]
    except (OSError, ValueError, KeyError) as error:
        raise PEFTError(
            f"{method}: no tokenizer could be read from {path!r} ({error}). Name a directory with one, or one on the "
            "Hugging Face hub, in tokenizer_name_or_path."
        ) from error
    if not ids:
        raise PEFTError(f"{method}: init_text={text!r} has no tokens in the eyes of its tokenizer. Give another text.")
    return list(ids)


@torch.no_grad()
def embedded(decoder: Decoder, ids: Tensor) -> Tensor:
    """Return the embeddings ``[tokens, hidden]`` of ``ids`` ``[tokens]``, on the meta device if the model is there."""
    embedding = _embedding(decoder)
    weight = whole(embedding.weight)
    rows: Tensor = torch.func.functional_call(embedding, {"weight": weight}, (ids.to(weight.device),))
    return rows


@torch.no_grad()
def observed(method: str, model: ModelView, decoder: Decoder, **inputs: Any) -> Any:
    """Return what the decoder makes of ``inputs`` without adapters; nothing, if it is on the meta device.

    Raises:
        PEFTError: It is in shards.
    """
    parameters = list(decoder.module.parameters())
    # Layers that tensor parallelism has split compute as ever, if every process asks them.
    if any(isinstance(m, FSDPModule) for m in model.modules.values()) or any(map(in_zero_pieces, parameters)):
        raise PEFTError(
            f"{method} starts from what the model makes of tokens, which cannot be computed here: its weights are in "
            "shards. Inject before they are sharded, or start at random."
        )
    if any(parameter.is_meta for parameter in parameters):
        return None
    with evaluating(decoder.module), disable(model.module) if registries(model) else nullcontext():
        return decoder.module(**inputs)


def start(method: str, parameter: Tensor, values: Tensor) -> None:
    """Copy initial values into a parameter.

    Raises:
        PEFTError: The model had no values yet to take them from.
    """
    if parameter.is_meta:
        return
    if values.is_meta:
        raise PEFTError(
            f"{method}: virtual tokens start from the model's weights, which had no values yet (device meta) when they "
            "were made. Load the model's weights before injecting, or start at random."
        )
    write(parameter, values)


def _embedding(decoder: Decoder) -> Any:
    return decoder.module.get_input_embeddings()  # type: ignore[operator]
