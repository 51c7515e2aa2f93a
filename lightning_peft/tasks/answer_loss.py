"""A language model's scores of the answer tokens alone, without paying the output head for the prompt."""

from __future__ import annotations

import inspect

import torch
from transformers import PreTrainedModel

from lightning_peft.adapters.virtual_tokens.infix import IGNORED, answers


def answer_logits(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score the tokens whose label is not `IGNORED`, each from the tokens before it.

    The output head is as wide as the vocabulary, a fifth of all the work in a small model. It runs on the
    last columns only, from the first answer's start: with padding on the left that is little more than the
    answers. The model's own forward is asked to do so, so that whatever it does to its logits (scaling,
    soft-capping) and whatever hooks are on its modules stay in force.

    Args:
        model: A causal language model.
        input_ids: Token ids, (batch, time), padded on either side.
        attention_mask: 1 for tokens, 0 for padding, (batch, time).
        labels: The token ids of the answers, `IGNORED` elsewhere, (batch, time).

    Returns:
        The logits, (answer tokens, vocabulary) in float32, and the tokens they should predict.
    """
    accepted = inspect.signature(model.forward).parameters
    time = labels.shape[1]
    # The token before the first answer token predicts it; the first token of all is predicted by none.
    is_answer = labels[:, 1:] != IGNORED
    keep = time - int(is_answer.any(dim=0).to(torch.int8).argmax())
    extra: dict[str, object] = {"use_cache": False}
    if "position_ids" in accepted:  # padding on the left must not count
        extra["position_ids"] = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    if "logits_to_keep" in accepted:
        extra["logits_to_keep"] = keep
    with answers(labels):
        logits = model(input_ids=input_ids, attention_mask=attention_mask, **extra).logits[:, -keep:]
    chosen = is_answer[:, -(keep - 1) :]
    return logits[:, :-1][chosen].float(), labels[:, -(keep - 1) :][chosen]
