"""What a run leaves behind: a module with its adapters attached, with its adapters merged, or a plain one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_peft.core.adapter import Adapter
from lightning_peft.core.registry import own_registry, registries, several_adapters, was_unloaded
from lightning_peft.core.view import ModelView
from lightning_peft.errors import NotFiniteError, PEFTError, listed
from lightning_peft.operations.merge import is_merged, merge
from lightning_peft.operations.mergeable import can_merge, refuse_unloading, weights_of
from lightning_peft.strategy.inventory import Inventory
from lightning_peft.structure.read_weights import WeightReads

UNLOAD = "unload"

# Beyond it a merge is reported as a warning. bfloat16 weights lose 3 to 20 % of a typical adapter.
_MERGE_LOSS_WARNING = 0.01


class Leaving(Inventory):
    """Merges adapters when training has ended, and knows a module that a run has left plain."""

    _merge_on_train_end: bool | Literal["unload"]
    _has_whole_weights: ClassVar[bool] = True
    """Whether every process holds the frozen weights whole."""
    _is_compiled = False
    _looks_for_reads = False

    @property
    def _unloads(self) -> bool:
        return self._merge_on_train_end == UNLOAD

    @property
    def _is_plain(self) -> bool:
        """Whether a run has left the module plain: an evaluation needs no adapters, and a checkpoint is Lightning's."""
        if own_registry(self._module) is not None:
            return False  # at once: nearly all runs have their adapters injected into the module as a whole
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

    def on_train_start(self) -> None:
        """Begin training, and look in its first step for weights that are read outside of their modules."""
        super().on_train_start()
        # Compiled while this is looked at, a model would be compiled anew for its second step.
        module, parts = self._module, self._module.modules()
        self._is_compiled = module._compiler_ctx is not None or any("_orig_mod" in part._modules for part in parts)
        self._looks_for_reads = not self._is_compiled

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Look in the first step of every epoch: what the loss is made of may depend on how far training is."""
        super().on_train_batch_start(batch, batch_idx)
        self._looks_for_reads |= batch_idx == 0 and not self._is_compiled

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Take a step; in some, find out which adapters cannot be merged for what else reads their weights.

        Raises:
            PEFTError: There are some, and a plain module is to be left.
        """
        if not self._looks_for_reads:
            return super().training_step(*args, **kwargs)
        self._looks_for_reads, view = False, ModelView(self._module)
        active = {name: (host, adapter) for name, host, slot in view.slots if (adapter := slot.active_adapter)}
        merged = {name: found for name, found in active.items() if can_merge(*found)}
        with WeightReads(view, {name: weights_of(*found) for name, found in merged.items()}) as reads:
            output = super().training_step(*args, **kwargs)
        if reads.found:
            self._keep_attached({name: merged[name][1] for name in reads.found}, next(iter(reads.found.values())))
        return output

    def _keep_attached(self, adapters: Mapping[str, Adapter], reader: str) -> None:
        """Leave ``adapters`` out of merges, since ``reader`` and others read the weights of their hosts."""
        text = (
            f"The weights of {listed(map(repr, adapters))} are also read by other code than their modules' ({reader}), "
            "which sees them without the adapter, and would see them with it once they were merged. Leave these "
            f"modules out, exclude_modules={list(adapters)!r}, or train them whole, train_also={list(adapters)!r}"
        )
        if self._unloads:
            raise PEFTError(f"{text}; or leave out merge_on_train_end='unload', which merges.")
        rank_zero_warn(f"{text}. The adapters will stay attached.")
        for adapter in adapters.values():
            adapter.mergeable = False

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
            rank_zero_warn(f"The adapters stay unmerged: the run has diverged. {self._diverged}")
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
