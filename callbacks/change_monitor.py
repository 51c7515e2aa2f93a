"""ChangeMonitor: how far each layer has moved, and how large its gradients are, along a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.analysis.changes import change_of, is_readable
from lightning_peft.analysis.plots import layer_plot, require_matplotlib
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.tensors.sharding import whole
from lightning_peft.tensors.weights import read_matrix


class ChangeMonitor(Callback):
    """Logs ‖ΔW‖/‖W‖ and the norm of the gradient for each adapted module, as ``change/MODULE`` and ``gradient/MODULE``.

    Gradients are those of the adapter's parameters together, averaged over the processes and before they are clipped.
    A module whose adapter is no change of a weight, such as a bottleneck, has a gradient alone.

    Args:
        every_n_steps: After how many optimizer steps to look. A look at a LoRA costs little; of other methods each
            change is worked out as a matrix as large as the weight.
        plots: A directory in which the last figures are drawn when training ends, a row for each kind of module and a
            column for each block: ``change.png`` and ``gradient.png``. TensorBoard is given them too. It needs
            matplotlib.

    Raises:
        PEFTError: The run has no logger and no ``plots``, or its base strategy keeps gradients or weights to itself
            (DeepSpeed, FSDP1).
    """

    def __init__(self, every_n_steps: int = 50, plots: str | None = None) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise PEFTError(f"ChangeMonitor: every_n_steps={every_n_steps} was given; it is at least 1.")
        self.every_n_steps, self.plots = every_n_steps, plots
        self._norms: dict[str, float] = {}
        self._gradients: dict[str, float] = {}
        self._seen, self._last = -1, dict[str, float]()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what could not be written or read, before the work."""
        if stage != "fit":
            return
        if self.plots is not None:
            require_matplotlib()
        elif not trainer.loggers:
            raise PEFTError("ChangeMonitor: the run has no logger. Give it one, or name a directory: plots='plots'.")
        if isinstance(trainer.strategy, DeepSpeedStrategy | FSDPStrategy):
            raise PEFTError(
                f"ChangeMonitor does not serve {type(trainer.strategy).__name__}, which keeps gradients or weights to "
                "itself. Leave it out, or train on DDP or FSDP2."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the step at which a run is resumed as seen: it was logged before."""
        self._seen = trainer.global_step

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Note the gradients of a step that will be logged."""
        if (trainer.global_step + 1) % self.every_n_steps == 0:
            view = ModelView(pl_module)
            for name, _, slot in view.slots:
                parameters = [] if slot.active_adapter is None else list(slot.active_adapter.parameters())
                if gradients := [whole(p.grad) for p in parameters if p.grad is not None]:
                    self._gradients[name] = _norm(gradients)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Log, if enough steps have been made."""
        step = trainer.global_step
        if step == self._seen or step % self.every_n_steps or not step:
            return
        self._seen = step
        self._last = {f"change/{name}": size for name, size in self._sizes(pl_module)}
        self._last |= {f"gradient/{name}": norm for name, norm in self._gradients.items()}
        self._gradients.clear()
        for logger in trainer.loggers:
            logger.log_metrics(self._last, step=step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the last figures."""
        if not self._last:
            rank_zero_warn(
                f"ChangeMonitor has logged nothing: it looks when {self.every_n_steps} steps have been made, and again "
                f"after as many, and this run ended at step {trainer.global_step}. Lower every_n_steps."
            )
        elif self.plots is not None:
            self._draw(trainer.loggers, Path(self.plots))

    @torch.no_grad()
    def _sizes(self, model: nn.Module) -> Iterator[tuple[str, float]]:
        """Yield the change of each weight, divided by the weight's norm, which stays as it was."""
        for name, host, slot in ModelView(model).slots:
            adapter = slot.active_adapter
            if adapter is None or not adapter.mergeable or adapter.replaces or not is_readable(host):
                continue
            if name not in self._norms:
                self._norms[name] = _norm([read_matrix(host)])
            change = change_of(name, host, adapter, weights=False).norm
            yield name, change / self._norms[name] if self._norms[name] else float("inf")

    @rank_zero_only
    def _draw(self, loggers: list[Any], folder: Path) -> None:
        for kind, label in (("change", "‖ΔW‖ / ‖W‖"), ("gradient", "‖gradient‖")):
            values = {name.partition("/")[2]: value for name, value in self._last.items() if name.startswith(kind)}
            if not values:
                continue
            figure = layer_plot(values, label)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                figure.savefig(folder / f"{kind}.png")
            except OSError as error:
                raise PEFTError(
                    f"{folder}/{kind}.png cannot be written: {error.strerror}. Name another place."
                ) from error
            for logger in loggers:
                if hasattr(logger.experiment, "add_figure"):
                    logger.experiment.add_figure(kind, figure, self._seen)


def _norm(tensors: list[Tensor]) -> float:
    return float(
        torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(tensor.double()) for tensor in tensors]))
    )
