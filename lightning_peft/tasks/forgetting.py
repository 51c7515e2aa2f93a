"""How much a language model forgets while it learns: its loss on text that has nothing to do with the task."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

from lightning_peft.core.contexts import disable, evaluating
from lightning_peft.core.registry import registries
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.tasks.batches.encoding import Encoder, Example, collate
from lightning_peft.tasks.batches.layouts import conversation
from lightning_peft.tasks.batches.records import read_records
from lightning_peft.tasks.causal_lm import CausalLM


class Forgetting(Callback):
    """Logs what training has done to the loss on unrelated text, beside each validation of a `CausalLM`.

    `val_other_loss` is the mean loss per token of the text, in nats; `val_forgetting` is what has been added to that of
    the model before training, without adapters: above zero the model has forgotten. HF PEFT's own benchmark of methods
    counts forgetting so.

    Args:
        file: Unrelated text: records in any layout of `InstructionData`, such as JSON lines with `text`; every token
            counts.
        batch_size: Rows at a time.
        max_length: Tokens of a row; a longer text goes on in another one.

    Raises:
        PEFTError: The file cannot be read, or the module is no `CausalLM`.
    """

    def __init__(self, file: str, batch_size: int = 16, max_length: int = 256) -> None:
        self.file = file
        self.batch_size = batch_size
        self.max_length = max_length
        self.before: float | None = None
        self._rows: list[Example] = []

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Read the text."""
        if not isinstance(pl_module, CausalLM):
            raise PEFTError(f"Forgetting watches the task CausalLM, not {type(pl_module).__name__}; leave it out")
        encoder = Encoder(pl_module.tokenizer, None, self.max_length, loss_on="all")
        found = [conversation(record) for record in read_records(self.file, "Forgetting(file)")]
        self._rows = [row for turns in found for row in encoder.examples(turns)]

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Take the loss before training, unless the checkpoint of a resumed run has it."""
        if self.before is None:
            self.before = self._without_adapters(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Log the loss, and how far it is from that before training."""
        if trainer.sanity_checking:
            return
        if self.before is None:
            self.before = self._without_adapters(trainer, pl_module)
        now = self._loss(trainer, pl_module)
        pl_module.log("val_other_loss", now)
        pl_module.log("val_forgetting", now - self.before)

    def state_dict(self) -> dict[str, Any]:
        """Return the loss before training."""
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the loss before training from a checkpoint."""
        self.before = state_dict["before"]

    def _without_adapters(self, trainer: Trainer, module: CausalLM) -> float:
        # Without a method of this package, nothing has been trained yet.
        with disable(module) if list(registries(ModelView(module))) else nullcontext():
            return self._loss(trainer, module)

    @torch.no_grad()
    def _loss(self, trainer: Trainer, module: CausalLM) -> float:
        """Return the mean loss per token of the text, of the model as it stands, in evaluation mode."""
        total, count = 0.0, 0
        with evaluating(module.model):
            for start in range(0, len(self._rows), self.batch_size):
                batch = collate(self._rows[start : start + self.batch_size], module.tokenizer.pad_token_id)
                tensors = {k: v.to(module.device) for k, v in batch.items() if isinstance(v, torch.Tensor)}
                with trainer.precision_plugin.forward_context():
                    logits, targets = module.answer_logits(tensors)
                total += nn.functional.cross_entropy(logits.float(), targets, reduction="sum").item()
                count += targets.numel()
        return total / count
