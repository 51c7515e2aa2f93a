"""Why an adapter stays beside a layer where others of its class are merged into the weights."""

from __future__ import annotations

from torch import nn

from lightning_peft.core.adapter import Adapter
from lightning_peft.structure.plain import is_weighted, nature
from lightning_peft.tensors.memory import is_expanded
from lightning_peft.tensors.packed import is_packed
from lightning_peft.tensors.weights import is_complex


def why_kept(host: nn.Module, adapter: Adapter) -> str | None:
    """Return why ``adapter`` cannot be merged into ``host``, if that is its host's doing, to be added to a message."""
    if not type(adapter).mergeable:
        return None
    if is_packed(host):
        if is_complex(host):
            return "its weight is complex, and a merge is worked out in real numbers"
        return "its weight is quantised, and the sum, quantised anew, would lose most of it"
    # What an adapter replaces is read by its host just as it is once merged.
    if not adapter.replaces and is_weighted(host) and nature(host) != "plain":
        return "it does not compute the plain function of its weight"
    if any(map(is_expanded, host._parameters.values())):
        return "elements of its weight lie in one place of memory, so they cannot get values of their own"
    if not adapter.mergeable and getattr(host, "groups", 1) > 1:
        return "it has several groups, and what is added mixes their channels, which no weight of it does"
    return None
