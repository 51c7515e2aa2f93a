"""Instruction tuning of a causal language model."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_peft.errors import PEFTError
from lightning_peft.tasks.answers.answer_loss import answer_logits, answer_loss, packing_error
from lightning_peft.tasks.language_model import LanguageModel


class CausalLM(LanguageModel):
    """A causal language model that learns to give an answer to a prompt, or to go on as texts do.

    Its data are those of `InstructionData`; what it logs and takes is said at `LanguageModel`.
    """

    auto_class = AutoModelForCausalLM
    _keeps_texts_apart = False

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the mean loss of the batch's answer tokens.

        Raises:
            PEFTError: Rows hold several texts, and the model does not keep them apart.
        """
        if "position_ids" in batch and not self._keeps_texts_apart:
            self._check_packing(batch)
        return super().training_step(batch, batch_idx)

    def answer_logits(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the scores of the batch's answer tokens, (tokens, vocabulary), and the tokens, (tokens,)."""
        mask, positions = batch.get("attention_mask"), batch.get("position_ids")
        return answer_logits(self.model, batch["input_ids"], mask, batch["labels"], positions)

    def answer_loss(self, batch: dict[str, Any]) -> Tensor:
        """Return the mean loss of the batch's answer tokens, to be differentiated once, in the memory of the scores."""
        if type(self).answer_logits is not CausalLM.answer_logits:
            return super().answer_loss(batch)  # of the scores that a class of the user's has
        mask, positions = batch.get("attention_mask"), batch.get("position_ids")
        return answer_loss(self.model, batch["input_ids"], mask, batch["labels"], positions)

    def _check_packing(self, batch: dict[str, Any]) -> None:
        error, rounding = packing_error(self.model, batch["input_ids"], batch["position_ids"], batch["labels"])
        if error > rounding:
            raise PEFTError(
                f"packing: {type(self.model).__name__} does not keep texts apart that share a row: the scores of one "
                f"differ by {error:.1%} from those of the same text alone. Recurrent layers do not, nor prompts and "
                "prefixes before the text. Set packing=False."
            )
        self._keeps_texts_apart = True
