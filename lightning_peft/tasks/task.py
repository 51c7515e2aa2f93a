"""What all ready modules share: the steps of an evaluation, and the optimizer."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from transformers import PreTrainedModel

from lightning_peft.tasks.schedule import adamw_with_linear_decay


class Task(LightningModule):
    """A pretrained model with a loss and metrics."""

    model: PreTrainedModel
    lr: float
    weight_decay: float
    warmup_steps: int

    @abstractmethod
    def evaluate(self, stage: str, batch: dict[str, Any]) -> None:
        """Update and log the metrics of a stage, `val` or `test`."""

    @abstractmethod
    def reset(self, stage: str) -> None:
        """Forget what the metrics of a stage have counted."""

    def forward(self, **inputs: Any) -> Any:
        """Call the pretrained model itself."""
        return self.model(**inputs)

    def on_validation_epoch_start(self) -> None:
        """Count anew: what `Trainer.validate` left behind in inference mode cannot be changed within `fit`."""
        self.reset("val")

    def on_test_epoch_start(self) -> None:
        """Count anew."""
        self.reset("test")

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Update the validation metrics."""
        self.evaluate("val", batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Update the test metrics."""
        self.evaluate("test", batch)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW over all parameters, with warm-up and linear decay."""
        return adamw_with_linear_decay(self, self.lr, self.weight_decay, self.warmup_steps)
