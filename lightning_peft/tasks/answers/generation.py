"""Completion of a list of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from lightning_peft.core.contexts import evaluating
from lightning_peft.errors import PEFTError


class StopAtText(StoppingCriteria):
    """Ends an answer at a token that contains `stop`, once the answer holds more than white space.

    Args:
        tokenizer: The model's tokenizer.
        stop: The text, such as a line break.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: str) -> None:
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        self.stop = stop
        self.stopping = torch.tensor([i for i, text in enumerate(texts) if stop in text], dtype=torch.long)
        self.blank = torch.tensor([i for i, text in enumerate(texts) if not text.strip()], dtype=torch.long)
        self.prompt_length = 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Say for each row of prompt and answer whether the answer has ended."""
        answers = input_ids[:, self.prompt_length :]
        begun = ~torch.isin(answers, self.blank.to(answers.device)).all(dim=1)
        return begun & torch.isin(answers[:, -1], self.stopping.to(answers.device))

    def cut(self, answer: str) -> str:
        """Cut the stopping text off an answer, and what follows it."""
        return answer.strip().split(self.stop)[0]


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    stop: StopAtText | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[str]:
    """Complete prompts, by default with the likeliest token at each step.

    Args:
        model: A language model, causal or an encoder-decoder.
        tokenizer: Its tokenizer.
        prompts: Their tokens.
        max_new_tokens: Tokens after which an answer ends in any case.
        batch_size: Prompts per call of the model. Prompts of like length are put together.
        stop: Ends an answer, beside the model's own end-of-text token.
        settings: What else transformers' `generate` is told.

    Returns:
        The answers, in the order of the prompts, without white space around them.

    Raises:
        PEFTError: transformers refuses the settings.
    """
    options = {"do_sample": False, **(settings or {}), "max_new_tokens": max_new_tokens}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        rows = {"input_ids": [list(prompts[i]) for i in chosen]}
        batch = tokenizer.pad(rows, padding_side="left", return_tensors="pt").to(model.device)
        # A decoder goes on with the prompt; behind an encoder it begins with one token of its own.
        prompt_length = 1 if model.config.is_encoder_decoder else batch["input_ids"].shape[1]
        if stop is not None:
            stop.prompt_length = prompt_length
        with evaluating(model):
            try:
                tokens = cast(Any, model).generate(
                    **batch,
                    pad_token_id=tokenizer.pad_token_id,
                    stopping_criteria=None if stop is None else [stop],
                    **options,
                )
            except (ValueError, TypeError) as error:
                if not settings:
                    raise
                raise PEFTError(f"generation={dict(settings)}: transformers refuses it: {error}") from error
        texts = tokenizer.batch_decode(tokens[:, prompt_length:], skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            answers[i] = (text if stop is None else stop.cut(text)).strip()
    return answers
