"""What a run leaves behind: a module with its adapters attached, with its adapters merged, or a plain one."""

from __future__ import annotations

from typing import ClassVar, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_peft.core.registry import registries, several_adapters, was_unloaded
from lightning_peft.core.view import ModelView
from lightning_peft.errors import NotFiniteError, PEFTError
from lightning_peft.operations.merge import is_merged, merge
from lightning_peft.operations.mergeable import refuse_unloading
from lightning_peft.strategy.inventory import Inventory

UNLOAD = "unload"

# Beyond it a merge is reported as a warning. bfloat16 weights lose 3 to 20 % of a typical adapter.
_MERGE_LOSS_WARNING = 0.01


class Leaving(Inventory):
    """Merges adapters when training has ended, and knows a module that a run has left plain."""

    _merge_on_train_end: bool | Literal["unload"]
    _has_whole_weights: ClassVar[bool] = True
    """Whether every process holds the frozen weights whole."""

    @property
    def _unloads(self) -> bool:
        return self._merge_on_train_end == UNLOAD

    @property
    def _is_plain(self) -> bool:
        """Whether a run has left the module plain: an evaluation needs no adapters, and a checkpoint is Lightning's."""
        view = ModelView(self._module)
        return not registries(view) and was_unloaded(view)

    def _refuse_leaving_plain(self) -> None:
        """Check that the run will be able to leave a plain module, if it is to.

        Raises:
            PEFTError: Adapters cannot be merged, or would leave another state dict, or checkpoints cannot be plain.
        """
        if not self._unloads:
            return
        if self._full_checkpoints and not self._has_whole_weights:
            raise PEFTError(
                "merge_on_train_end='unload' was given with checkpoint='full', which writes merged weights, on a base "
                "strategy that holds them in pieces. Use checkpoint='adapter', or base='ddp'."
            )
        refuse_unloading(ModelView(self._module))

    def on_train_end(self) -> None:
        """Merge. Lightning calls this last, after every checkpoint has been written."""
        super().on_train_end()
        if self._merge_on_train_end and self._is_real_run() and not is_merged(self._module):
            self._merge()

    def _merge(self) -> None:
        if several := several_adapters(ModelView(self._module)):
            rank_zero_info(
                f"The model has several adapters, {', '.join(several)}, so none was merged. merge(model) merges the "
                "active one."
            )
            return
        if self._diverged:
            rank_zero_warn(f"The adapters stay unmerged: the run has diverged. {self._diverged}.")
            return
        try:
            report = merge(self._module, unload=self._unloads)
        except NotFiniteError as error:
            # The run has ended as it would without adapters: what diverged is for the user to see.
            rank_zero_warn(f"The adapters stay unmerged: the run has diverged. {error}")
            return
        if self._unloads:
            # They hold the adapters that were.
            self.optimizers, self.lr_scheduler_configs = [], []
        (rank_zero_warn if report.largest_loss > _MERGE_LOSS_WARNING else rank_zero_info)(str(report))
