"""Where the prompt of a text ends, and the places of virtual tokens around it.

Infix tokens stand after the prompt. With ``labels`` (the model's own argument, or those of :func:`answers`) the prompt
of a row is what stands before its first answered token. Without, all that the model is called with is prompt: what is
generated from it comes after the infix tokens, which the key-value cache holds by then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_peft.adapters.virtual_tokens.virtual_tokens import by_name
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.of_thread import OfThread
from lightning_peft.errors import PEFTError

IGNORED = -100
"""The label of a token that is no answer, in transformers."""

_ANSWERS: ContextVar[Tensor | None] = ContextVar("answers", default=None)


@contextmanager
def answers(labels: Tensor) -> Iterator[None]:
    """Within it, models are called with texts whose answers ``labels`` shows.

    For modules that do not pass ``labels`` to the model because they compute the loss themselves.

    Args:
        labels: ``[batch, tokens]``; -100 where a token is no answer.
    """
    token = _ANSWERS.set(labels)
    try:
        yield
    finally:
        _ANSWERS.reset(token)


class PromptEnd(Adapter):
    """On the model around the decoder, if it is a language model: keeps its labels until the decoder is called."""

    by_row = False
    words: tuple[str, str] = "PromptTuning", "infix tokens belong"
    """The method and what it wants to know, for errors."""

    def __init__(self) -> None:
        super().__init__()
        self._labels = OfThread()

    def reset_parameters(self) -> None:
        """Do nothing: there are no values."""

    def labels(self) -> Tensor | None:
        """Return what shows the answers in the present call ``[batch, tokens]``, if something does."""
        labels: Tensor | None = self._labels.value
        self._labels.value = None
        return _ANSWERS.get() if labels is None else labels

    def __setstate__(self, state: dict[str, Any]) -> None:
        # One that an older version pickled has ``None``.
        super().__setstate__({**state, "_labels": OfThread()})

    def before(
        self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Keep the labels.

        Raises:
            PEFTError: There are none, and it shows that the text is not all prompt.
        """
        named, cache = by_name(base, args, kwargs)
        labels, keep = named.get("labels"), named.get("logits_to_keep")
        self._labels.value = labels
        unclear = {
            "in training": base.training and torch.is_grad_enabled(),
            "with use_cache=False, as generate without a cache does": named.get("use_cache") is False,
            "with logits_to_keep, as assisted generation does": isinstance(keep, int) and keep > 1,
        }
        begins = cache is None or cache.get_seq_length() == 0
        unlabelled = labels is None and _ANSWERS.get() is None
        if begins and unlabelled and (how := [reason for reason, holds in unclear.items() if holds]):
            method, what = self.words
            raise PEFTError(
                f"{method}: the model was called without labels {how[0]}, so that it is not known where the prompt "
                f"ends and {what}. Pass labels to the model, or call it within "
                f"{answers.__module__}.answers(labels); generate with a cache and without an assistant."
            )
        return args, kwargs


def prompt_ends(mask: Tensor, labels: Tensor | None, words: tuple[str, str] = PromptEnd.words) -> Tensor:
    """Return how many of a row's columns come before what follows its prompt, ``[batch]``.

    Args:
        mask: ``[batch, tokens]``; zero where a token is padding.
        labels: ``[batch, tokens]``; -100 where a token is no answer.
        words: As of :class:`PromptEnd`.

    Raises:
        PEFTError: A text is answered from its first token on.
    """
    real, size = mask != 0, mask.shape[1]
    columns = torch.arange(size, device=mask.device).expand_as(mask)
    ends = torch.where(real, columns + 1, 0).amax(dim=1)
    if labels is None:
        return ends
    answered = real & (labels.to(mask.device) != IGNORED)
    starts, first = (torch.where(which, columns, size).amin(dim=1) for which in (real, answered))
    # Memory is planned on tensors that have no values.
    if not hasattr(mask, "fake_mode") and bool((answered.any(dim=1) & (first <= starts)).any()):
        raise PEFTError(
            f"{words[0]}: labels were given that are answers from a text's first token on, so there is no prompt, and "
            f"it is not known where {words[1]}. Set the labels of the prompt to {IGNORED}."
        )
    return torch.where(answered.any(dim=1), first, ends)


@dataclass(frozen=True, eq=False)
class Layout:
    """``prefix`` virtual tokens before a text, and ``infix`` of them after the first ``ends`` ``[batch]`` columns."""

    prefix: int
    infix: int
    ends: Tensor

    @property
    def added(self) -> int:
        """How many virtual tokens there are."""
        return self.prefix + self.infix

    def widened(self, text: Tensor, virtual: Tensor) -> Tensor:
        """Return ``text`` ``[batch, tokens, …]`` with ``virtual`` ``[batch, prefix + infix, …]`` in its places."""
        before, after = virtual.to(text.dtype).split([self.prefix, self.infix], dim=1)
        if self.infix:
            size = text.shape[1]
            columns = torch.arange(size + self.infix, device=text.device)
            behind = columns - self.ends[:, None]
            order = torch.where(behind < self.infix, size + behind, columns - self.infix)
            order = torch.where(behind < 0, columns, order)
            text = _taken(torch.cat([text, after], dim=1), order)
        return torch.cat([before, text], dim=1)

    def positions(self, given: Tensor) -> Tensor:
        """Return the position ids of a text and of the virtual tokens in it, of the text's ``[batch or 1, tokens]``."""
        given = given.expand(len(self.ends), -1)
        columns = torch.arange(given.shape[1], device=given.device)
        shifted = given + self.prefix + self.infix * (columns >= self.ends[:, None])
        last = shifted.gather(1, (self.ends - 1).clamp(min=0)[:, None])
        first = torch.arange(self.prefix, device=given.device).expand(len(given), -1)
        following = last + 1 + torch.arange(self.infix, device=given.device)
        return self.widened(shifted, torch.cat([first, following], dim=1))

    def narrowed(self, values: Tensor) -> Tensor:
        """Return what the text has of ``values`` ``[batch, prefix + tokens + infix, …]``.

        The prompt's last token, from which the answer's first one is predicted, gets what the last infix token has.
        """
        text = values[:, self.prefix :]
        if not self.infix:
            return text
        columns = torch.arange(text.shape[1] - self.infix, device=values.device)
        return _taken(text, columns + self.infix * (columns >= self.ends[:, None] - 1))

    def replaced(self, values: Tensor, virtual: Tensor) -> Tensor:
        """Return ``values`` ``[batch, prefix + tokens + infix, …]`` with ``virtual`` in the virtual tokens' places."""
        before, after = virtual.to(values.dtype).split([self.prefix, self.infix], dim=1)
        values = torch.cat([before, values[:, self.prefix :]], dim=1)
        if not self.infix:
            return values
        places = self.prefix + self.ends[:, None] + torch.arange(self.infix, device=values.device)
        return values.scatter(1, places[..., None].expand_as(after), after)


def _taken(values: Tensor, columns: Tensor) -> Tensor:
    """Return ``values`` ``[batch, tokens, …]`` at ``columns`` ``[batch, any]``."""
    for _ in range(values.dim() - 2):
        columns = columns.unsqueeze(-1)
    return values.gather(1, columns.expand(-1, -1, *values.shape[2:]))
