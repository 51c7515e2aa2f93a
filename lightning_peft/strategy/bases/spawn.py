"""Launchers that start workers from this process: results travel back to a module that was never set up here."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_peft.core.registry import note_unloaded, registries
from lightning_peft.core.view import ModelView
from lightning_peft.operations.eject import eject
from lightning_peft.operations.merge import is_merged, merge, unmerge
from lightning_peft.strategy.lifecycle import Lifecycle


class PEFTMultiProcessingLauncher(_MultiProcessingLauncher):
    """Brings adapters back from the workers.

    Lightning sends the worker's ``state_dict`` to the main process and loads it there without strictness: adapters
    that are not injected in the main process would be dropped without a word, and a merge would be forgotten.
    """

    _strategy: Lifecycle  # type: ignore[assignment]

    def _collect_rank_zero_results(self, trainer: pl.Trainer, results: Any) -> Any:
        module, plain = trainer.lightning_module, self._strategy._is_plain
        merged = is_merged(module)
        if merged:
            # The copies of the weights that undo a merge are no part of the state: send it unmerged, merge over there.
            unmerge(module)
        output = super()._collect_rank_zero_results(trainer, results)
        if output is not None:
            output.extra.update(lightning_peft_merged=merged, lightning_peft_plain=plain)
        return output

    def _recover_results_in_main_process(self, worker_output: Any, trainer: pl.Trainer) -> None:
        module, plain = trainer.lightning_module, worker_output.extra["lightning_peft_plain"]
        if plain:
            self._take_out(module)
        else:
            self._inject(module)
        adapted = bool(registries(ModelView(module)))
        if adapted:
            unmerge(module)
        super()._recover_results_in_main_process(worker_output, trainer)
        if adapted and worker_output.extra["lightning_peft_merged"]:
            merge(module)

    def _take_out(self, module: pl.LightningModule) -> None:
        """Leave the module plain in this process too."""
        if registries(ModelView(module)):
            eject(module)
        note_unloaded(module)

    def _inject(self, module: pl.LightningModule) -> None:
        """Inject in this process, in which no ``setup`` ran."""
        if is_overridden("configure_model", module) and not registries(ModelView(module)):
            rank_zero_warn(
                "The model was built by configure_model in the worker processes, so this process has no model to load "
                "the trained adapters into. Use load_adapter(model, path) with a checkpoint."
            )
        else:
            self._strategy.inject()
