"""What is trained is what is saved, and what changes is what is saved: looked after in the whole of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_peft.core.registry import added, differs, moved, note_moved, registries, trained_whole, trains_everything
from lightning_peft.core.view import ModelView, seen_parameters
from lightning_peft.errors import listed
from lightning_peft.operations.shards import resharded
from lightning_peft.strategy import refusals
from lightning_peft.strategy.frozen_weights import FrozenWeights
from lightning_peft.strategy.optimizers.optim import held_parameters
from lightning_peft.strategy.training import Training
from lightning_peft.tensors.sharding import host_copy


class Inventory(Training):
    """Keeps the account of a model's tensors in a run: trained, changed, or as they were."""

    _full_checkpoints: bool
    _leaves_frozen: ClassVar[bool] = True
    """Whether the base strategy leaves frozen weights where they are, so that it shows if someone writes to them."""

    _built: Mapping[str, Tensor] = MappingProxyType({})
    """The buffers of a module without adapters as its constructor left them."""
    _frozen: FrozenWeights | None = None
    _told: set[str]
    """The names of weights that were said to require a gradient and not to be trained."""
    _count = 0
    """How many parameters the optimizers held when they were last checked."""

    def connect(self, model: pl.LightningModule) -> None:
        """Attach the module, before its ``setup`` and that of callbacks give buffers other values."""
        super().connect(model)
        view, self._frozen, self._held, self._told = ModelView(model), None, {}, set()
        self._built = {} if registries(view) else {name: host_copy(buffer) for name, buffer in view.buffers.items()}

    def _note_built(self) -> None:
        """Note the buffers that differ from what the constructor makes, which ``load_from_checkpoint`` starts from."""
        view = ModelView(self._module)
        buffers = view.buffers
        built = {name: value for name, value in self._built.items() if name in buffers}
        note_moved(view, [name for name, value in built.items() if differs(buffers[name], value)])

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        """Look at the frozen weights before ``configure_optimizers``, the first hook at which there are adapters."""
        self._look()
        super().setup_optimizers(trainer)

    def _look(self) -> None:
        """Look at the frozen weights as they are."""
        if self._leaves_frozen and not self._full_checkpoints:
            view = resharded(self._module)
            self._frozen = FrozenWeights(view)
            if trains_everything(view):
                # What is frozen may be unfrozen later: checkpoints are those of a run without this package.
                note_moved(view, view.parameters.keys() - {name for name, _, _ in trained_whole(view)})

    def on_train_start(self) -> None:
        """Check what hooks and callbacks have unfrozen since ``setup``."""
        super().on_train_start()
        self._refuse_unsaved()
        self._told = set()
        self._tell_idle(resharded(self._module))

    def _tell_idle(self, view: ModelView) -> None:
        """Name once what of the base has been unfrozen, or is new, and is not trained."""
        known = {*self._held, *map(id, held_parameters(self.optimizers)), *(id(t) for _, t, _ in trained_whole(view))}
        idle = {n: p for n, p in seen_parameters(view).items() if id(p) not in known and n not in self._told}
        new = sorted(idle.keys() & added(view))
        unfrozen = [name for name, p in idle.items() if p.requires_grad and name not in new]
        self._told.update(new, unfrozen)
        if new:
            rank_zero_warn(
                f"{len(new)} parameters are new since the adapters were injected, and no optimizer holds them, so they "
                f"are not trained: {listed(new)}. Checkpoints hold them, for a module that has them when it is loaded. "
                "Make modules in __init__, setup or configure_model."
            )
        if unfrozen:
            rank_zero_warn(
                f"{len(unfrozen)} weights of the base require a gradient, but no optimizer holds them, so they are not "
                f"trained: {', '.join(unfrozen[:3])}. They were unfrozen since setup. To train them, name their "
                "modules in train_also."
            )

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Step, after a check if the optimizers hold other parameters than they did: before one is trained in vain."""
        if sum(len(group["params"]) for o in self.optimizers for group in o.param_groups) != self._count:
            self._refuse_unsaved()
        return super().optimizer_step(optimizer, closure, model, **kwargs)

    def _refuse_unsaved(self, view: ModelView | None = None) -> None:
        """Check that checkpoints have everything that is trained.

        Args:
            view: The module, if it has been looked at.

        Raises:
            PEFTError: They have not.
        """
        self._count = len(held_parameters(self.optimizers))
        if not self._full_checkpoints:
            refusals.refuse_unsaved(self.optimizers, view or resharded(self._module), self._held)

    def _take_stock(self, view: ModelView) -> None:
        """Check that what is trained will be saved, and note what else has changed."""
        self._refuse_unsaved(view)
        self._tell_idle(view)
        written = sorted(self._written(view) - moved(view))
        note_moved(view, written)
        written = [name for name in written if name not in added(view)]  # which have been told
        if written and not trains_everything(view):
            rank_zero_warn(
                f"{len(written)} frozen weights have changed though no optimizer holds them: {', '.join(written[:3])}. "
                "From now on checkpoints hold them too. If they were to stay as they are, look for what writes to "
                "them: an average, a callback, the training step."
            )

    def _written(self, view: ModelView) -> set[str]:
        """Return the names of frozen weights that have changed since training began."""
        return set() if self._frozen is None else self._frozen.changed(view)

    def on_train_end(self) -> None:
        """Take stock a last time, before anything is merged."""
        super().on_train_end()
        self._take_stock(resharded(self._module))
        self._frozen = None
