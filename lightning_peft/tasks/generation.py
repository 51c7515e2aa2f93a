"""Greedy completion of a list of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from lightning_peft.adapters.virtual_tokens.initial_tokens import evaluating


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
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    stop: StopAtText | None = None,
) -> list[str]:
    """Complete prompts with the likeliest token at each step.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer, padding on the left.
        prompts: Texts, used as they are.
        max_new_tokens: Tokens after which an answer ends in any case.
        batch_size: Prompts per call of the model. Prompts of like length are put together.
        stop: Ends an answer, beside the model's own end-of-text token.

    Returns:
        The answers, in the order of the prompts, without white space around them.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer([prompts[i] for i in chosen], padding=True, return_tensors="pt").to(model.device)
        prompt_length = batch["input_ids"].shape[1]
        if stop is not None:
            stop.prompt_length = prompt_length
        with evaluating(model):
            tokens = cast(Any, model).generate(
                **batch,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                stopping_criteria=None if stop is None else [stop],
            )
        texts = tokenizer.batch_decode(tokens[:, prompt_length:], skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            answers[i] = (text if stop is None else stop.cut(text)).strip()
    return answers
