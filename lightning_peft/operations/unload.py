"""Whether adapters can be merged for good, which ``merge(unload=True)`` does."""

from __future__ import annotations

from lightning_peft.core.registry import several_adapters
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.operations.merge import can_merge, weights_of
from lightning_peft.structure.kept import why_kept


def refuse_unloading(model: ModelView) -> None:
    """Check that merging for good will leave a model whose state is that of one that is built anew.

    Raises:
        PEFTError: An adapter cannot be merged, adds a bias, or has a weight untied; or one is left over.
    """
    reasons = [f"the model has several adapters, {', '.join(names)}" for names in [several_adapters(model)] if names]
    shared = model.shared
    for name, host, slot in model.slots:
        adapter = slot.active_adapter
        if adapter is None:
            continue
        kind = type(adapter).__name__
        if adapter.adds_bias and host._parameters.get("bias") is None:
            reasons.append(f"{kind} gives {name!r} a bias, for which a model that is built anew has no place")
        elif not can_merge(host, adapter):
            why = why_kept(host, adapter)
            reasons.append(f"{kind} cannot be merged into a weight of {name!r}" + (f" ({why})" if why else ""))
        elif not adapter.follows_ties and any(id(weight) in shared for weight in weights_of(host, adapter)):
            reasons.append(f"{name!r} shares its weight with another module, from which merging {kind} unties it")
    if reasons:
        raise PEFTError(
            f"merge_on_train_end='unload' was given, which leaves a plain module behind; but {reasons[0]}. Take "
            "methods and modules that can be merged for good, or leave out 'unload'."
        )
