"""What a run should train or load as well: parts of the module whose values are new, and would stay as they are."""

from __future__ import annotations

from collections.abc import Iterator, Set

from torch import nn

from lightning_peft.core.registry import registries
from lightning_peft.core.view import ModelView
from lightning_peft.errors import listed
from lightning_peft.structure.attention import surrounding
from lightning_peft.structure.frozen import head_beside
from lightning_peft.structure.new_parts import last_layer, new_parts, new_rows, outermost, parts_beside
from lightning_peft.targets.patterns import PRESETS, as_list

_TRAIN = "Train them with the adapter:"


def own_train_also(module: nn.Module, given: list[str] | None) -> list[str]:
    """Return ``train_also`` as it was given, or else as the module itself says it, in an attribute of that name."""
    return as_list(getattr(module, "train_also", ())) if given is None else given


def untrained(model: ModelView) -> Iterator[str]:
    """Yield what to tell a user of new parts of ``model`` that are frozen.

    Args:
        model: A model with adapters.
    """
    adapted = [name for name, _, _ in model.slots]
    beside = [name for name in parts_beside(model) if not any(f"{host}.".startswith(f"{name}.") for host in adapted)]
    if new := [name for name in (*new_parts(model), *beside) if _is_frozen(model, name)]:
        yield (
            f"The pretrained model's files had no values for {listed(map(repr, new))}. Frozen, new parts stay as they "
            f"were drawn, and no checkpoint has them. {_TRAIN} PEFTStrategy(..., train_also={new!r})."
        )
    for name, (before, now) in new_rows(model).items():
        if name not in adapted and _is_frozen(model, name):
            yield (
                f"{name!r} is frozen, and its rows from {before} on are new: the vocabulary has {now} tokens now. "
                f"{_TRAIN} PEFTStrategy([..., NewTokens(token_indices=list(range({before}, {now})))])."
            )
    named = {name for name in head_beside(model) if not any(around in adapted for around in surrounding(name))}
    if left := [name for name in outermost(model, named) if name not in new and _is_frozen(model, name)]:
        yield (
            f"{listed(map(repr, left))} was to be trained beside what you had frozen by hand, and is frozen now, as is "
            f"all that has no adapter. {_TRAIN} PEFTStrategy(..., train_also={left!r})."
        )
    last = last_layer(model)
    reached = last is None or any(around in adapted for around in surrounding(last))
    told = last is not None and any(around in left for around in surrounding(last))
    if last is not None and not (reached or told) and _leaves_out(model) and _is_frozen(model, last):
        yield (
            f"{last!r} ({type(model.modules[last]).__name__}), the last layer, is frozen: target_modules leaves it "
            f"out. Is it new? Train it with the adapter: PEFTStrategy(..., train_also=[{last!r}])."
        )


def unloaded(model: ModelView, empty: Set[str]) -> str | None:
    """Return what to tell a user of frozen weights that nothing was loaded into, or None if there are none.

    Args:
        model: A model that has been set up.
        empty: Names of the parameters that had no memory before (``torch.device("meta")``).
    """
    drawn = [name for name in model.parameters if name in empty and not model.parameters[name].requires_grad]
    if not drawn:
        return None
    return (
        f"{listed(map(repr, drawn))} had no values (the module was built on the meta device), and none were loaded: "
        "they are random now, and frozen. Name the directory that has them: PEFTStrategy(..., base_weights=DIRECTORY); "
        "or load them in configure_model, before inject()."
    )


def _leaves_out(model: ModelView) -> bool:
    """Whether what is adapted was found by a preset, and not named."""
    found = (
        method for _, _, registry in registries(model) for methods in registry.methods.values() for method in methods
    )
    targets = [getattr(method, "target_modules", None) for method in found]
    return any(pattern in PRESETS for target in targets if target is not None for pattern in as_list(target))


def _is_frozen(model: ModelView, part: str) -> bool:
    """Whether adapters froze ``part``, a module or a parameter, which the user had not."""
    before = {
        f"{prefix}.{name}" if prefix else name: value
        for prefix, _, registry in registries(model)
        for name, value in registry.requires_grad.items()
    }
    own = {name: p for name, p in model.parameters.items() if f"{name}.".startswith(f"{part}.")}
    return not any(p.requires_grad for p in own.values()) and any(before.get(name, True) for name in own)
