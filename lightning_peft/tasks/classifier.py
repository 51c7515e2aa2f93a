"""What the ready classifiers share: loading, the head that is trained, steps and metrics."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_peft.core.view import ModelView
from lightning_peft.structure.new_parts import heads, new_parts
from lightning_peft.tasks.pretrained import Dtype, load_model, load_tokenizer
from lightning_peft.tasks.task import Task


class Classifier(Task):
    """A classifier on a pretrained model.

    The head is trained whole and saved with the adapter, unless the strategy is given another `train_also`. Validation
    logs `val_loss`, `val_accuracy` and `val_f1` (macro average over classes); testing the same with `test_`.

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

    auto_class: ClassVar[Any]

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
        self.model = load_model(model, self.auto_class, cache_dir=cache_dir, dtype=dtype, num_labels=num_labels)
        # Decoders classify at the last token that is no padding, and ask the configuration which that is.
        self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        metrics = self.make_metrics(num_labels)
        self.metrics = nn.ModuleDict({stage: metrics.clone(prefix=f"{stage}_") for stage in ("val", "test")})

    @property
    def train_also(self) -> list[str]:
        """The modules that mean nothing before they are trained: the head, and what else has no pretrained values."""
        model = ModelView(self.model)
        return [f"model.{name}" for name in dict.fromkeys([*heads(model), *new_parts(model)])]

    @abstractmethod
    def make_metrics(self, num_labels: int) -> MetricCollection:
        """Return the metrics of a stage."""

    @abstractmethod
    def scores(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the scores that metrics take, and the batch's mean loss."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss of the batch."""
        _, loss = self.scores(batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def reset(self, stage: str) -> None:
        """Forget what the metrics of a stage have counted."""
        metrics: Any = self.metrics[stage]
        metrics.reset()

    def evaluate(self, stage: str, batch: dict[str, Any]) -> None:
        """Update and log the metrics of a stage."""
        (scores, loss), size = self.scores(batch), len(batch["labels"])
        metrics: Any = self.metrics[stage]
        metrics.update(scores, batch["labels"])
        self.log(f"{stage}_loss", loss, prog_bar=True, batch_size=size, sync_dist=True)
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=size)
