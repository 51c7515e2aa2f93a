"""GenerationSamples: what the model answers to a few prompts, after each validation, where the other figures are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn

from lightning_peft.errors import PEFTError


class GenerationSamples(Callback):
    """Lets the model answer a few prompts after each validation, and gives prompts and answers to the logger.

    TensorBoard shows them under "Text", Weights & Biases as a table; where no logger takes texts they are printed. The
    module has a method ``generate(prompts)`` that returns a text for each, as the ready language models do.

    Args:
        prompts: Texts, or turns of a conversation; by default the first prompts of the validation data.
        count: How many of the validation data's prompts to take.

    Raises:
        PEFTError: The module has no ``generate``, or no prompts were given and the validation data have none.
    """

    def __init__(self, prompts: Sequence[Any] | None = None, count: int = 4) -> None:
        super().__init__()
        if count < 1 or (prompts is not None and not prompts):
            raise PEFTError("GenerationSamples: no prompts were asked for. Give some, or count=4.")
        self.prompts, self.count = prompts, count
        self._found: list[Any] = []
        self._answers: list[str] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a module that generates nothing, before the work."""
        if not callable(getattr(pl_module, "generate", None)):
            raise PEFTError(
                f"GenerationSamples: {type(pl_module).__name__} has no generate(prompts) that returns texts; the ready "
                "tasks CausalLM and Seq2Seq have one."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell a user whose run has no validation."""
        if not (trainer.enable_validation and any(trainer.num_val_batches)):
            rank_zero_warn("GenerationSamples: this run has no validation, after which it would generate. Give data.")

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the prompts anew."""
        self._found, self._answers = [], []

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Take the first prompts of the data, with their answers."""
        if self.prompts is None and isinstance(batch, dict) and len(self._found) < self.count:
            room = self.count - len(self._found)
            self._found += list(batch.get("prompts", ()))[:room]
            self._answers += list(batch.get("answers", ()))[:room]

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Generate on every process, since a model in pieces needs them all, and log on the first."""
        if trainer.sanity_checking:
            return
        prompts = self._found if self.prompts is None else list(self.prompts)
        if not prompts:
            raise PEFTError("GenerationSamples: the validation data have no prompts. Give some: prompts=['...'].")
        answers = list(pl_module.generate(prompts))  # type: ignore[operator]
        if len(answers) != len(prompts):
            raise PEFTError(
                f"GenerationSamples: {type(pl_module).__name__}.generate returned {len(answers)} answers to "
                f"{len(prompts)} prompts; a text for each was expected."
            )
        tokenizer: Any = getattr(pl_module, "tokenizer", None)
        rows = [
            [_text(prompt, tokenizer), answer, *expected]
            for prompt, answer, expected in zip(
                prompts, answers, [[text] for text in self._answers] or [[]] * len(prompts), strict=True
            )
        ]
        _log(trainer.loggers, rows, trainer.global_step)


def _text(prompt: Any, tokenizer: Any) -> str:
    """Return a prompt as it is read: tokens as text, the turns of a conversation one after the other."""
    if isinstance(prompt, str):
        return prompt
    if prompt and isinstance(prompt[0], int):
        return str(tokenizer.decode(prompt))
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


@rank_zero_only
def _log(loggers: Sequence[Any], rows: list[list[str]], step: int) -> None:
    columns = ["prompt", "answer", "expected"][: len(rows[0])]
    taken = False
    for logger in loggers:
        if hasattr(logger, "log_text"):
            logger.log_text("samples", columns=columns, data=rows, step=step)
        elif hasattr(logger.experiment, "add_text"):
            logger.experiment.add_text("samples", _markdown(columns, rows), step)
        else:
            continue
        taken = True
    if not taken:
        for row in rows:
            rank_zero_info("\n".join(f"{column}: {text}" for column, text in zip(columns, row, strict=True)))


def _markdown(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *([_cell(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", "<br>")
