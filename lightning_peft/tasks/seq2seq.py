"""Fine-tuning of an encoder-decoder such as T5 or BART: summaries, translation, answers."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

from lightning_peft.adapters.virtual_tokens.infix import IGNORED
from lightning_peft.tasks.language_model import LanguageModel


class Seq2Seq(LanguageModel):
    """An encoder-decoder that learns to give an answer to a text, such as its summary or translation.

    Its data are those of `Seq2SeqData`; what it logs and takes is said at `LanguageModel`.
    """

    auto_class = AutoModelForSeq2SeqLM

    def answer_logits(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the scores of the batch's answer tokens, (tokens, vocabulary), and the tokens, (tokens,)."""
        labels = batch["labels"]
        # With labels, transformers makes the decoder's inputs of them: shifted, behind the token that begins an answer.
        logits = self.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels, use_cache=False
        ).logits
        answered = labels != IGNORED
        return logits[answered].float(), labels[answered]
