"""Launchers that start workers from this process: results travel back to a module that was never set up here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from lightning_peft.core.registry import registries
from lightning_peft.core.view import ModelView
from lightning_peft.operations.merge import is_merged, merge, unmerge

if TYPE_CHECKING:
    from lightning_peft.strategy import PEFTStrategy


class PEFTMultiProcessingLauncher(_MultiProcessingLauncher):
    """Brings adapters back from the workers.

    Lightning sends the worker's ``state_dict`` to the main process and loads it there without strictness: adapters
    that are not injected in the main process would be dropped without a word, and a merge would be forgotten.
    """

    _strategy: PEFTStrategy  # type: ignore[assignment]

    def _collect_rank_zero_results(self, trainer: pl.Trainer, results: Any) -> Any:
        module = trainer.lightning_module
        merged = is_merged(module)
        if merged:
            # The copies of the weights that undo a merge are no part of the state: send it unmerged, merge over there.
            unmerge(module)
        output = super()._collect_rank_zero_results(trainer, results)
        if output is not None:
            output.extra["lightning_peft_merged"] = merged
        return output

    def _recover_results_in_main_process(self, worker_output: Any, trainer: pl.Trainer) -> None:
        module = trainer.lightning_module
        self._strategy.inject_in_main_process()
        adapted = bool(registries(ModelView(module)))
        if adapted:
            unmerge(module)
        super()._recover_results_in_main_process(worker_output, trainer)
        if adapted and worker_output.extra["lightning_peft_merged"]:
            merge(module)
