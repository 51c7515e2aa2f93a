"""Take adapters out again."""

from __future__ import annotations

import torch
from torch import nn

from lightning_peft.core.adapter import base_tensors
from lightning_peft.core.refusals import refuse_stand_in
from lightning_peft.core.registry import required
from lightning_peft.core.sharding import replace, whole
from lightning_peft.operations.inject import remove
from lightning_peft.operations.merge import unmerge


def eject(model: nn.Module) -> None:
    """Take all adapters out: the model is the object it was before :func:`inject`, values included.

    A merged model is restored too. To keep the adapters' effect in the weights, call ``merge(model, unload=True)``.

    Raises:
        PEFTError: There are no adapters.
    """
    roots = required(model)
    refuse_stand_in(model, "eject")
    unmerge(model)
    for _, root, registry in roots:
        tensors = base_tensors(root)
        with torch.no_grad():
            for name, value in registry.whole.items():
                replace(tensors[name], whole(value))
        remove(root, registry)
