"""Classification of texts by an encoder or decoder with a classification head."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import Accuracy, F1Score, MetricCollection
from transformers import AutoModelForSequenceClassification

from lightning_peft.core.view import ModelView
from lightning_peft.structure.new_parts import heads, new_parts
from lightning_peft.tasks.pretrained import Dtype, load_model, load_tokenizer
from lightning_peft.tasks.schedule import adamw_with_linear_decay


class SequenceClassification(LightningModule):
    """A text classifier on a pretrained model.

    The head is trained whole and saved with the adapter, unless the strategy is given another `train_also`. Validation
    logs `val_loss`, `val_accuracy` and `val_f1` (macro average over classes); testing the same with `test_`. `predict`
    returns class numbers.

    Args:
        model: A directory, a name on the Hugging Face hub, or `package:NAME` for model files inside the
            installed Python package NAME.
        num_labels: Number of classes.
        lr: Learning rate after the warm-up; it then falls linearly to zero.
        weight_decay: Weight decay of AdamW.
        warmup_steps: Steps over which the learning rate rises from zero.
        dtype: Of the weights in memory: float32, bfloat16 or float16.
        cache_dir: Where dequantised GGUF models are kept. The user's cache folder by default.
    """

    def __init__(
        self,
        model: str,
        num_labels: int,
        lr: float = 2e-4,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        dtype: Dtype = "float32",
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.tokenizer = load_tokenizer(model, cache_dir)
        self.model = load_model(
            model, AutoModelForSequenceClassification, cache_dir=cache_dir, dtype=dtype, num_labels=num_labels
        )
        # Decoders classify at the last token that is no padding, and ask the configuration which that is.
        self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        metrics = MetricCollection(
            {
                "accuracy": Accuracy(task="multiclass", num_classes=num_labels),
                "f1": F1Score(task="multiclass", num_classes=num_labels, average="macro"),
            }
        )
        self.metrics = nn.ModuleDict({stage: metrics.clone(prefix=f"{stage}_") for stage in ("val", "test")})

    @property
    def train_also(self) -> list[str]:
        """The modules that mean nothing before they are trained: the head, and what else has no pretrained values."""
        model = ModelView(self.model)
        return [f"model.{name}" for name in dict.fromkeys([*heads(model), *new_parts(model)])]

    def forward(self, **inputs: Tensor) -> Any:
        """Call the classifier itself."""
        return self.model(**inputs)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss of the batch."""
        loss: Tensor = self.model(**batch).loss
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Update the validation metrics."""
        self._evaluate("val", batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Update the test metrics."""
        self._evaluate("test", batch)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the number of the likeliest class of each text."""
        logits: Tensor = self.model(**batch).logits
        return logits.argmax(dim=-1)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW over all parameters, with warm-up and linear decay."""
        return adamw_with_linear_decay(self, self.lr, self.weight_decay, self.warmup_steps)

    def _evaluate(self, stage: str, batch: dict[str, Tensor]) -> None:
        output, size = self.model(**batch), len(batch["labels"])
        metrics: Any = self.metrics[stage]
        metrics.update(output.logits, batch["labels"])
        self.log(f"{stage}_loss", output.loss, prog_bar=True, batch_size=size, sync_dist=True)
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=size)
