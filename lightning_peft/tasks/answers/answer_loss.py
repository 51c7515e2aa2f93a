"""A language model's scores of the answer tokens alone, without paying the output head for the prompt."""

from __future__ import annotations

import inspect

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from lightning_peft.adapters.virtual_tokens.infix import IGNORED, answers
from lightning_peft.core.contexts import evaluating
from lightning_peft.tasks.answers.mean_loss import mean_loss

_KEEPS_NONE = ("lightning_peft.", "torch.distributed.", "deepspeed.")


def answer_logits(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    labels: torch.Tensor,
    position_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score the tokens whose label is not `IGNORED`, each from the tokens before it.

    The output head is as wide as the vocabulary, a fifth of all the work in a small model. It runs on the
    last columns only, from the first answer's start: with padding on the left that is little more than the
    answers. The model's own forward is asked to do so, so that whatever it does to its logits (scaling,
    soft-capping) and whatever hooks are on its modules stay in force.

    Args:
        model: A causal language model.
        input_ids: Token ids, (batch, time), padded on either side.
        attention_mask: 1 for tokens, 0 for padding, (batch, time); None where rows hold several texts.
        labels: The token ids of the answers, `IGNORED` elsewhere, (batch, time).
        position_ids: The place of each token in its text, (batch, time); by default counted without padding.

    Returns:
        The logits, (answer tokens, vocabulary) in float32, and the tokens they should predict.
    """
    logits, targets = _scores(model, input_ids, attention_mask, labels, position_ids)
    chosen = targets != IGNORED
    return logits[chosen].float(), targets[chosen]


def answer_loss(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    labels: torch.Tensor,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the mean of `cross_entropy` over what `answer_logits` returns for the same arguments.

    It makes no copy of the scores, which are overwritten unless hooks of others look at what the model or its head
    returns: they may keep it.
    """
    scores, targets = _scores(model, input_ids, attention_mask, labels, position_ids)
    return mean_loss(scores, targets, overwrites=not _is_looked_at(model))


def _is_looked_at(model: PreTrainedModel) -> bool:
    found = [module for module in (model, model.get_output_embeddings()) if module is not None]
    hooks = [hook for module in found for hook in module._forward_hooks.values()]
    # This package's own, and those that gather and shard, keep no scores.
    return any(not (getattr(hook, "__module__", None) or "").startswith(_KEEPS_NONE) for hook in hooks)


def _scores(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    labels: torch.Tensor,
    position_ids: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scores, (batch, columns, vocabulary), and the tokens that they should predict, or `IGNORED`."""
    accepted = inspect.signature(model.forward).parameters
    time = labels.shape[1]
    # The token before the first answer token predicts it; the first token of all is predicted by none.
    is_answer = labels[:, 1:] != IGNORED
    keep = time - int(is_answer.any(dim=0).to(torch.int8).argmax())
    extra: dict[str, object] = {"use_cache": False}
    if position_ids is None and attention_mask is not None:  # padding on the left must not count
        position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    if "position_ids" in accepted:
        extra["position_ids"] = position_ids
    if "logits_to_keep" in accepted:
        extra["logits_to_keep"] = keep
    with answers(labels):
        logits: torch.Tensor = model(input_ids=input_ids, attention_mask=attention_mask, **extra).logits
    if logits.shape[1] > keep:
        logits = logits[:, -keep:]
    # The last token of all predicts none.
    targets = functional.pad(labels[:, -(keep - 1) :], (0, 1), value=IGNORED)
    return logits, targets


@torch.no_grad()
def packing_error(
    model: PreTrainedModel, input_ids: torch.Tensor, position_ids: torch.Tensor, labels: torch.Tensor
) -> tuple[float, float]:
    """Compare the scores of a text that shares its row with those of the same text alone.

    It shows whether a model keeps texts apart: neither recurrent layers, nor a prompt in front of a row, nor an
    attention that does not read positions does.

    Args:
        model: A causal language model.
        input_ids: Token ids, (batch, time), of which the second text of the first row is taken.
        position_ids: The place of each token in its text, (batch, time).
        labels: As for `answer_logits`, (batch, time).

    Returns:
        The norm of the difference relative to that of the scores, and what rounding makes of it at most.
    """
    starts = [*(position_ids[0] == 0).nonzero()[:, 0].tolist(), input_ids.shape[1]]
    # A row with a single text is compared with itself: every process calls the model as often.
    start, end = (starts[1], starts[2]) if len(starts) > 2 else (0, starts[1])

    def scores(begin: int) -> torch.Tensor:
        part = slice(0, 1), slice(begin, end)
        with answers(labels[part]):
            output = model(input_ids=input_ids[part], position_ids=position_ids[part], use_cache=False)
        logits: torch.Tensor = output.logits
        return logits[0, start - begin :]

    with evaluating(model):
        shared, alone = scores(0), scores(start)
    difference = torch.linalg.vector_norm((shared - alone).float()) / torch.linalg.vector_norm(alone.float())
    return difference.item(), torch.finfo(alone.dtype).eps ** 0.5
