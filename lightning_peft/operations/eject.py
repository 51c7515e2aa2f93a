"""Take adapters out again."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial

from torch import nn

from lightning_peft.core.adapter import detach
from lightning_peft.core.refusals import refuse_stand_in
from lightning_peft.core.registry import refuse_shared, registries, required, restore_changed, trained_whole
from lightning_peft.core.to_the_end import to_the_end
from lightning_peft.core.view import ModelView
from lightning_peft.operations.inject import remove
from lightning_peft.operations.merge import restore_weights
from lightning_peft.operations.shards import resharded
from lightning_peft.tensors.sharding import assign


def eject(model: nn.Module) -> None:
    """Take all adapters out: the model is the object it was before :func:`inject`, values included.

    A merged model is restored too. To keep the adapters' effect in the weights, call ``merge(model, unload=True)``.

    Raises:
        PEFTError: There are no adapters.
    """
    view = resharded(model)
    roots = required(view)
    refuse_stand_in(view, "eject")
    refuse_shared(view)
    unknown: list[str] = []
    to_the_end(partial(_take_out, view, [prefix for prefix, _, _ in roots], unknown))
    if unknown:
        warnings.warn(
            f"{len(unknown)} frozen tensors of the base were written to, and no copies of them were kept, so they stay "
            f"as they are: {', '.join(unknown[:3])}. Load the base model again.",
            stacklevel=2,
        )


def _take_out(model: ModelView, roots: Sequence[str], unknown: list[str]) -> None:
    """Give everything its old value, and detach all adapters; ``unknown`` gets the names of what has no old value."""
    restore_weights(model)
    for _, tensor, value in trained_whole(model):
        assign(tensor, value)
    unknown[:] = restore_changed(model)
    for prefix in reversed(roots):  # what is around a part may have been frozen before it
        remove(model.part(prefix))


def eject_unpickled(module: nn.Module) -> None:
    """Take the adapters off a module that was pickled with them, perhaps without what they were injected into.

    What was trained whole, of which that one kept the old values, then stays as it is.
    """
    view = ModelView(module)
    if registries(view):
        eject(module)
    elif view.slots:
        restore_weights(view)
        for _, host, _ in view.slots:
            detach(host)
        for parameter in view.parameters.values():
            parameter.requires_grad_(parameter.is_floating_point())
