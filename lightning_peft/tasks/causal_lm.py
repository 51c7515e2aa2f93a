"""Instruction tuning of a causal language model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import Accuracy, MeanMetric, Metric
from transformers import PreTrainedModel

from lightning_peft.tasks.answer_loss import answer_logits
from lightning_peft.tasks.generation import StopAtText, complete
from lightning_peft.tasks.pretrained import Dtype, load_model, load_tokenizer
from lightning_peft.tasks.schedule import adamw_with_linear_decay


class Perplexity(MeanMetric):
    """The exponential of the mean loss per token."""

    def compute(self) -> Tensor:
        """Return e to the mean."""
        return super().compute().exp()


class CausalLM(LightningModule):
    """A causal language model that learns to give an answer to a prompt.

    The loss is that of the answer's tokens alone. Validation logs `val_loss`, `val_perplexity` and
    `val_accuracy` (share of answer tokens that the model puts first); testing logs the same with `test_`, and
    `test_exact_match`: the share of prompts to which the model writes the answer, character by character.

    Args:
        model: A directory, a name on the Hugging Face hub, or `package:NAME` for model files inside the
            installed Python package NAME. A directory may hold one GGUF file instead of safetensors.
        lr: Learning rate after the warm-up; it then falls linearly to zero.
        weight_decay: Weight decay of AdamW.
        warmup_steps: Steps over which the learning rate rises from zero.
        gradient_checkpointing: Compute activations again in the backward pass, to need less memory.
        max_new_tokens: Tokens after which a generated answer ends.
        stop: Text that ends a generated answer, such as a line break. The end-of-text token always does.
        generation_batch_size: Prompts that are completed at the same time.
        dtype: Of the weights in memory: float32, bfloat16 or float16.
        cache_dir: Where dequantised GGUF models are kept. The user's cache folder by default.
    """

    def __init__(
        self,
        model: str,
        lr: float = 2e-4,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        gradient_checkpointing: bool = False,
        max_new_tokens: int = 64,
        stop: str | None = None,
        generation_batch_size: int = 32,
        dtype: Dtype = "float32",
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.max_new_tokens = max_new_tokens
        self.stop = stop
        self.generation_batch_size = generation_batch_size
        self.tokenizer = load_tokenizer(model, cache_dir)
        self.model = self.load(model, cache_dir, dtype)
        if gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.metrics = nn.ModuleDict({stage: self._make_metrics() for stage in ("val", "test")})
        self.exact_match = MeanMetric()

    def load(self, model: str, cache_dir: str | None, dtype: Dtype) -> PreTrainedModel:
        """Return the language model. Override it to build one in another way."""
        return load_model(model, cache_dir=cache_dir, dtype=dtype)

    def _make_metrics(self) -> nn.ModuleDict:
        vocabulary = self.model.config.get_text_config().vocab_size
        accuracy = Accuracy(task="multiclass", num_classes=vocabulary, average="micro")
        return nn.ModuleDict({"loss": MeanMetric(), "perplexity": Perplexity(), "accuracy": accuracy})

    def forward(self, **inputs: Tensor) -> Any:
        """Call the language model itself."""
        return self.model(**inputs)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the mean loss of the batch's answer tokens."""
        logits, targets = self._answer_logits(batch)
        loss = nn.functional.cross_entropy(logits, targets)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Update `val_loss`, `val_perplexity` and `val_accuracy`."""
        self._evaluate("val", batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Update the same for the test, and `test_exact_match` by generating answers."""
        self._evaluate("test", batch)
        answers = self.generate(batch["prompts"])
        right = [float(a == b.strip()) for a, b in zip(answers, batch["answers"], strict=True)]
        self.exact_match.update(torch.tensor(right, device=self.device))
        self._log_metric("test_exact_match", self.exact_match, batch)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[str]:
        """Return the generated answers to the batch's prompts."""
        return self.generate(batch["prompts"])

    def generate(self, prompts: Sequence[str], max_new_tokens: int | None = None) -> list[str]:
        """Complete prompts, taking the likeliest token at each step.

        Args:
            prompts: Texts, used as they are.
            max_new_tokens: Tokens after which an answer ends; the module's own number by default.

        Returns:
            The answers in the order of the prompts.
        """
        return complete(
            self.model,
            self.tokenizer,
            prompts,
            max_new_tokens=self.max_new_tokens if max_new_tokens is None else max_new_tokens,
            batch_size=self.generation_batch_size,
            stop=self._stop,
        )

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW over all parameters, with warm-up and linear decay."""
        return adamw_with_linear_decay(self, self.lr, self.weight_decay, self.warmup_steps)

    @cached_property
    def _stop(self) -> StopAtText | None:
        return StopAtText(self.tokenizer, self.stop) if self.stop else None

    def _answer_logits(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return answer_logits(self.model, batch["input_ids"], batch["attention_mask"], batch["labels"])

    def _evaluate(self, stage: str, batch: dict[str, Any]) -> None:
        logits, targets = self._answer_logits(batch)
        losses = nn.functional.cross_entropy(logits, targets, reduction="none")
        metrics: Any = self.metrics[stage]
        metrics["loss"].update(losses)
        metrics["perplexity"].update(losses)
        metrics["accuracy"].update(logits.argmax(dim=-1), targets)
        for name, metric in metrics.items():
            self._log_metric(f"{stage}_{name}", metric, batch)

    def _log_metric(self, name: str, metric: Metric, batch: dict[str, Any]) -> None:
        progress_bar = name.endswith(("loss", "match"))
        self.log(name, metric, on_step=False, on_epoch=True, prog_bar=progress_bar, batch_size=len(batch["labels"]))
