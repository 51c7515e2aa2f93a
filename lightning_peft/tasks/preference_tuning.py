"""Direct preference optimisation, with the model without its adapters as the reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapters.virtual_tokens.infix import IGNORED
from lightning_peft.core.contexts import disable, evaluating
from lightning_peft.core.registry import adapted
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.operations.merge import is_merged, merge, unmerge
from lightning_peft.tasks.causal_lm import CausalLM


def dpo_losses(policy: Tensor, reference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Compute the loss of direct preference optimisation (Rafailov et al. 2023, equation 7).

    Args:
        policy: Log-probabilities of whole answers under the trained model, (2 x pairs,): the better ones first.
        reference: The same under the model that training began with.
        beta: How strongly the trained model is held to the reference.

    Returns:
        The loss of each pair, -log sigmoid of the margin, and the margin: beta times how much more the better answer
        has gained than the worse one, both (pairs,).
    """
    better, worse = (beta * (policy - reference)).chunk(2)
    return -nn.functional.logsigmoid(better - worse), better - worse


class PreferenceTuning(CausalLM):
    """A causal language model that learns which of two answers is the better, by direct preference optimisation.

    The reference is the model itself with its adapters off, so that no second model is held. Its data are those of
    `PreferenceData`. Training logs `train_loss` and `train_accuracy` (share of pairs whose better answer has gained
    more), validation and testing `val_` or `test_` `loss`, `accuracy` and `margin`.

    Args:
        model: As for `CausalLM`, as is what is not named here.
        beta: How strongly the trained model is held to the reference.
        **options: See `LanguageModel`.

    Raises:
        PEFTError: The model cannot be loaded.
    """

    def __init__(self, model: str, beta: float = 0.1, **options: Any) -> None:
        super().__init__(model, **options)
        self.beta = beta
        self._was_merged = False

    def on_train_start(self) -> None:
        """Check that there is a reference."""
        self._require_reference()

    def on_validation_epoch_start(self) -> None:
        """Take adapters out of the weights for as long as the model is its own reference."""
        self._take_apart()

    def on_test_epoch_start(self) -> None:
        """Take adapters out of the weights for as long as the model is its own reference."""
        self._take_apart()

    def on_validation_epoch_end(self) -> None:
        """Leave the adapters as they were, in the weights or beside them."""
        self._put_together()

    def on_test_epoch_end(self) -> None:
        """Leave the adapters as they were, in the weights or beside them."""
        self._put_together()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the mean loss of the batch's pairs."""
        losses, margins = self._losses(batch)
        pairs = len(losses)
        self.log("train_loss", losses.mean(), prog_bar=True, batch_size=pairs)
        self.log("train_accuracy", (margins > 0).float().mean(), batch_size=pairs)
        return losses.mean()

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Update `test_loss`, `test_accuracy` and `test_margin`."""
        self.evaluate("test", batch)

    def evaluate(self, stage: str, batch: dict[str, Any]) -> None:
        """Log the loss, the share of pairs whose better answer has gained more, and the margin."""
        losses, margins = self._losses(batch)
        for name, values in {"loss": losses, "accuracy": (margins > 0).float(), "margin": margins}.items():
            self.log(
                f"{stage}_{name}", values.mean(), on_epoch=True, prog_bar=True, batch_size=len(losses), sync_dist=True
            )

    def _require_reference(self) -> None:
        if not adapted(ModelView(self)):
            raise PEFTError(
                "PreferenceTuning has no adapters, without which the model is its own reference and learns nothing: "
                'give the Trainer a strategy with a method, such as strategy="peft_lora"'
            )

    def _take_apart(self) -> None:
        self._require_reference()
        self._was_merged = is_merged(self)
        unmerge(self)

    def _put_together(self) -> None:
        if self._was_merged:
            merge(self)

    def _losses(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), evaluating(self.model), disable(self):
            reference = self._log_probabilities(batch)
        return dpo_losses(self._log_probabilities(batch), reference, self.beta)

    def _log_probabilities(self, batch: dict[str, Any]) -> Tensor:
        logits, targets = self.answer_logits(batch)
        of_tokens = -nn.functional.cross_entropy(logits, targets, reduction="none")
        # The answer tokens come row by row.
        rows = (batch["labels"][:, 1:] != IGNORED).nonzero()[:, 0]
        return torch.zeros(len(batch["labels"]), device=self.device).index_add(0, rows, of_tokens)
