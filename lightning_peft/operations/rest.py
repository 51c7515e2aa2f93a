"""What is around parts of a model that have adapters of their own, loaded or injected before."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import nn

from lightning_peft.core.registry import registries
from lightning_peft.core.to_the_end import to_the_end
from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.operations.by_hand import watch
from lightning_peft.operations.inject import freeze, thaw
from lightning_peft.operations.prepare import whole_names


def freeze_rest(model: nn.Module, train_also: Sequence[str] = ()) -> list[str]:
    """Freeze what of ``model`` is around parts that have adapters, as an injection into all of it would have done.

    Args:
        model: A model with adapters in parts of it.
        train_also: Patterns of modules to train whole and to save with the adapters.

    Returns:
        The names of the parameters that were trainable and are frozen now.

    Raises:
        PEFTError: A pattern matches nothing, or a module that has adapters already.
    """
    view = ModelView(model)
    parts = registries(view)
    already = {f"{prefix}.{name}".strip(".") for prefix, _, registry in parts for name in registry.train_also}
    whole = [name for name in whole_names(view, train_also) if name not in already]
    for name in whole:
        for prefix, _, _ in parts:
            if f"{name}.".startswith(f"{prefix}.") or f"{prefix}.".startswith(f"{name}."):
                raise PEFTError(
                    f"train_also: {name!r} and {prefix!r}, which has adapters already, are one inside the other. Pass "
                    f"train_also to inject({prefix}, ...), or leave the injection to the strategy."
                )
    trainable = [name for name, parameter in view.parameters.items() if parameter.requires_grad]
    try:
        registry = freeze(view, parts[0][2].active, whole, ())
        watch(view.module, registry, ())
    except BaseException:
        to_the_end(partial(thaw, view))
        raise
    return [name for name in trainable if name in registry.requires_grad and name not in registry.whole]
