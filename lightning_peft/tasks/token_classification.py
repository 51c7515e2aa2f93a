"""Labels for the words of a text, by an encoder or decoder with a head over its tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchmetrics import Accuracy, F1Score, MetricCollection
from transformers import AutoModelForTokenClassification

from lightning_peft.adapters.virtual_tokens.infix import IGNORED
from lightning_peft.tasks.classifier import Classifier


class TokenClassification(Classifier):
    """A classifier of words on a pretrained model, such as one that finds names.

    Its data are those of `TokenData`; what it logs and takes is said at `Classifier`. Words are counted, not entities
    of several words. `predict` returns the class numbers of each text's words.
    """

    auto_class = AutoModelForTokenClassification

    def make_metrics(self, num_labels: int) -> MetricCollection:
        """Return the share of right words, and F1 (macro average over classes)."""
        options: dict[str, Any] = {"task": "multiclass", "num_classes": num_labels, "ignore_index": IGNORED}
        return MetricCollection(
            {"accuracy": Accuracy(**options, average="micro"), "f1": F1Score(**options, average="macro")}
        )

    def scores(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return a score for each class of each token, (batch, classes, time), and the mean loss of the words."""
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "starts")}
        logits: Tensor = self.model(**inputs).logits.transpose(1, 2).float()
        return logits, nn.functional.cross_entropy(logits, batch["labels"], ignore_index=IGNORED)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[list[int]]:
        """Return the number of the likeliest class of each word of each text."""
        numbers = self.scores(batch)[0].argmax(dim=1)
        return [row[starts].tolist() for row, starts in zip(numbers, batch["starts"], strict=True)]
