"""Classification of texts by an encoder or decoder with a classification head."""

from __future__ import annotations

from torch import Tensor
from torchmetrics import Accuracy, F1Score, MetricCollection
from transformers import AutoModelForSequenceClassification

from lightning_peft.tasks.classifier import Classifier


class SequenceClassification(Classifier):
    """A classifier of texts on a pretrained model.

    Its data are those of `ClassificationData`; what it logs and takes is said at `Classifier`. `predict` returns class
    numbers.
    """

    auto_class = AutoModelForSequenceClassification

    def make_metrics(self, num_labels: int) -> MetricCollection:
        """Return the share of right texts, and F1 (macro average over classes)."""
        accuracy = Accuracy(task="multiclass", num_classes=num_labels)
        f1 = F1Score(task="multiclass", num_classes=num_labels, average="macro")
        return MetricCollection({"accuracy": accuracy, "f1": f1})

    def scores(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return a score for each class, (batch, classes), and the mean loss."""
        output = self.model(**batch)
        return output.logits, output.loss

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the number of the likeliest class of each text."""
        logits: Tensor = self.model(**batch).logits
        return logits.argmax(dim=-1)
