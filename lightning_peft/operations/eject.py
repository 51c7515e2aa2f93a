"""Take adapters out again."""

from __future__ import annotations

import warnings

from torch import nn

from lightning_peft.core.adapter import detach
from lightning_peft.core.refusals import refuse_stand_in
from lightning_peft.core.registry import registries, required, restore_changed, trained_whole
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
    restore_weights(view)
    for _, tensor, value in trained_whole(view):
        assign(tensor, value)
    if unknown := restore_changed(view):
        warnings.warn(
            f"{len(unknown)} frozen tensors of the base were written to, and no copies of them were kept, so they stay "
            f"as they are: {', '.join(unknown[:3])}. Load the base model again.",
            stacklevel=2,
        )
    for prefix, _, registry in roots:
        remove(view.part(prefix), registry)


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
