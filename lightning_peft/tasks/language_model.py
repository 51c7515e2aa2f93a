"""What the ready language models share: loading, generation, and how answers are trained and judged."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, cast

from torch import Tensor, nn
from torchmetrics import Accuracy, MeanMetric, Metric
from transformers import PreTrainedModel

from lightning_peft.errors import PEFTError
from lightning_peft.tasks.answers.generation import StopAtText, complete
from lightning_peft.tasks.answers.mean_loss import mean_loss
from lightning_peft.tasks.answers.text_metrics import text_metrics
from lightning_peft.tasks.batches.chat import ChatTemplate
from lightning_peft.tasks.batches.layouts import Conversation, Message
from lightning_peft.tasks.pretrained import Dtype, load_model, load_tokenizer
from lightning_peft.tasks.task import Task

Prompt = str | Sequence[int] | Sequence[Message]
"""A text that is used as it is, its tokens, or the turns of a conversation."""


class Perplexity(MeanMetric):
    """The exponential of the mean loss per token."""

    def compute(self) -> Tensor:
        """Return e to the mean."""
        return super().compute().exp()


class LanguageModel(Task):
    """A language model that learns to give an answer to a prompt.

    The loss is that of the answer's tokens alone. Validation logs `val_loss`, `val_perplexity` and
    `val_accuracy` (share of answer tokens that the model puts first); testing logs the same with `test_`, and a
    metric of generated answers for each of `metrics`, such as `test_exact_match`.

    Args:
        model: A directory, a name on the Hugging Face hub, or `package:NAME` for model files inside the
            installed Python package NAME. A directory may hold one GGUF file instead of safetensors.
        lr: Learning rate after the warm-up; it then falls linearly to zero.
        weight_decay: Weight decay of AdamW.
        warmup_steps: Steps over which the learning rate rises from zero.
        gradient_checkpointing: Compute activations again in the backward pass, to need less memory.
        max_new_tokens: Tokens after which a generated answer ends.
        stop: Text that ends a generated answer, such as a line break. The end-of-text token always does.
        generation: What else transformers' `generate` is told, such as `{do_sample: true, temperature: 0.7}` or
            `{num_beams: 4}`; the likeliest token at each step by default.
        generation_batch_size: Prompts that are completed at the same time.
        metrics: Names of metrics of generated answers: exact_match, last_number (arithmetic), logical_form (SQL), rouge
            (rouge1, rouge2, rougeL), bleu, sacre_bleu, chrf, edit_distance, word_error_rate.
        dtype: Of the weights in memory: float32, bfloat16 or float16.
        cache_dir: Where dequantised GGUF models are kept. The user's cache folder by default.

    Raises:
        PEFTError: The model cannot be loaded, or there is no metric of a name.
    """

    auto_class: ClassVar[Any]

    def __init__(
        self,
        model: str,
        lr: float = 2e-4,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        gradient_checkpointing: bool = False,
        max_new_tokens: int = 64,
        stop: str | None = None,
        generation: dict[str, Any] | None = None,
        generation_batch_size: int = 32,
        metrics: Sequence[str] = ("exact_match",),
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
        self.generation = generation or {}
        self.generation_batch_size = generation_batch_size
        self.text_metrics = text_metrics(metrics)
        self.tokenizer = load_tokenizer(model, cache_dir)
        self.model = self.load(model, cache_dir, dtype)
        if gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.metrics = nn.ModuleDict({stage: self._make_metrics() for stage in ("val", "test")})

    def load(self, model: str, cache_dir: str | None, dtype: Dtype) -> PreTrainedModel:
        """Return the language model. Override it to build one in another way."""
        return load_model(model, self.auto_class, cache_dir=cache_dir, dtype=dtype)

    @abstractmethod
    def answer_logits(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the scores of the batch's answer tokens, (tokens, vocabulary), and the tokens, (tokens,)."""

    def answer_loss(self, batch: dict[str, Any]) -> Tensor:
        """Return the mean loss of the batch's answer tokens, to be differentiated once."""
        return mean_loss(*self.answer_logits(batch))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the mean loss of the batch's answer tokens."""
        loss = self.answer_loss(batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Update the test metrics, and those of generated answers."""
        self.evaluate("test", batch)
        answers = self.generate(batch["prompts"]) if self.text_metrics else []
        for name, metric in self.text_metrics.items():
            cast(Any, metric).update(answers, batch["answers"])
            self._log_metric(f"test_{name}", cast(Metric, metric), batch)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[str]:
        """Return the generated answers to the batch's prompts."""
        return self.generate(batch["prompts"])

    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int | None = None) -> list[str]:
        """Complete prompts, by default with the likeliest token at each step.

        Args:
            prompts: Each a text, used as it is, or its tokens, or the turns of a conversation (`role` and `content`),
                which the tokenizer's chat template writes.
            max_new_tokens: Tokens after which an answer ends; the module's own number by default.

        Returns:
            The answers in the order of the prompts.

        Raises:
            PEFTError: Turns were given and the tokenizer has no template, or transformers knows no such setting of
                `generation`.
        """
        return complete(
            self.model,
            self.tokenizer,
            [self._tokens(prompt) for prompt in prompts],
            max_new_tokens=self.max_new_tokens if max_new_tokens is None else max_new_tokens,
            batch_size=self.generation_batch_size,
            stop=self._stop,
            settings=self.generation,
        )

    @cached_property
    def _stop(self) -> StopAtText | None:
        return StopAtText(self.tokenizer, self.stop) if self.stop else None

    def reset(self, stage: str) -> None:
        """Forget what the metrics of a stage have counted."""
        for metric in (*cast(Any, self.metrics[stage]).values(), *self.text_metrics.values()):
            cast(Metric, metric).reset()

    def _make_metrics(self) -> nn.ModuleDict:
        vocabulary = self.model.config.get_text_config().vocab_size
        accuracy = Accuracy(task="multiclass", num_classes=vocabulary, average="micro")
        return nn.ModuleDict({"loss": MeanMetric(), "perplexity": Perplexity(), "accuracy": accuracy})

    def _tokens(self, prompt: Prompt) -> Sequence[int]:
        if isinstance(prompt, str):
            return cast("list[int]", self.tokenizer(prompt)["input_ids"])
        if isinstance(prompt[0], int):
            return cast(Sequence[int], prompt)
        if not self.tokenizer.chat_template:
            raise PEFTError("generate: turns of a conversation were given, but the tokenizer has no chat template")
        turns = Conversation("generate", [dict(cast(Message, turn)) for turn in prompt])
        text = ChatTemplate(self.tokenizer).prompt(turns)
        return cast("list[int]", self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def evaluate(self, stage: str, batch: dict[str, Any]) -> None:
        """Update and log the metrics of a stage."""
        logits, targets = self.answer_logits(batch)
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
