"""From patterns to modules: what to adapt. A pattern that matches nothing is an error with near names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_peft.core.view import ModelView, is_inside
from lightning_peft.errors import PEFTError, listed
from lightning_peft.structure import plain
from lightning_peft.structure.experts import expert_weights
from lightning_peft.structure.frozen import REASON, left_frozen
from lightning_peft.structure.layers import in_layers
from lightning_peft.targets.patterns import PRESETS, Matcher, Names, as_list, nothing_matched
from lightning_peft.targets.presets import in_preset, nothing_in_preset, uncalled_modules
from lightning_peft.tensors.weights import is_script


def select(
    model: ModelView,
    targets: Names,
    *,
    adaptable: Callable[[nn.Module], bool],
    obstacle: Callable[[str, nn.Module], str | None] | None = None,
    weights: Callable[[nn.Module], Iterable[str]] | None = None,
    written: Callable[[dict[str, Any], Mapping[str, nn.Module]], str] | None = None,
    exclude: Names | None = None,
    layers: str | Sequence[int] | None = None,
) -> dict[str, nn.Module]:
    """Return the modules of ``model`` that ``targets`` name, by name, in the model's order.

    ``"all-linear"``, ``"attention"`` and ``"mlp"`` take of what they find that which can be adapted, and the rest is a
    remark of ``model``. What a pattern names has to be possible.

    Args:
        model: Where to look.
        targets: ``"all-linear"`` (without the output head), ``"attention"``, ``"mlp"``, or patterns (see
            :func:`matches`), mixed at will.
        adaptable: Whether the method adapts modules of a kind. A pattern passes over others, unless it matches nothing
            else.
        obstacle: Gives the reason why the method cannot adapt one of such a kind, by name, all the same.
        weights: Gives the names of parameters of a module that can be adapted one by one. They are selected by their
            own name, ``experts.down_proj``, and returned by it, with that module.
        written: Gives what to write instead of a preset that means nothing here; see :func:`nothing_in_preset`.
        exclude: Patterns of modules to leave out, with all that is in them.
        layers: Indices of blocks to adapt, or a slice (``"8:16"``, ``"-4:"``). Modules outside blocks go.

    Raises:
        PEFTError: A pattern matches nothing (the nearest names are listed), or modules that cannot be adapted, or a
            layer does not exist.
    """
    modules: dict[str, nn.Module] = dict(model.modules)
    candidates = {name: module for name, module in modules.items() if adaptable(module) and not is_script(module)}
    parameters = {
        f"{name}.{weight}".lstrip("."): module
        for name, module in modules.items()
        for weight in (() if weights is None or name in candidates or is_script(module) else weights(module))
    }
    modules, candidates = {**modules, **expert_weights(model), **parameters}, candidates | parameters

    def nothing(preset: str) -> str:
        refused = _reasons(model, candidates, candidates, parameters, obstacle)
        return nothing_in_preset(model, preset, candidates, refused, written)

    meant = _matched(model, targets, modules, candidates, nothing)
    named = {name for pattern, found in meant.items() if pattern not in PRESETS for name in found}
    chosen = {name for found in meant.values() for name in found}
    excluding = Matcher(modules)
    for pattern in as_list(exclude or ()):
        found = excluding(pattern)
        if not found:
            raise PEFTError(nothing_matched(pattern, modules, candidates, what="exclude_modules"))
        chosen = {name for name in chosen if not is_inside(name, found)}
    if layers is not None:
        inside = set(in_layers(model, chosen, layers))
        if lost := [pattern for pattern, found in meant.items() if found & chosen and not found & inside]:
            raise PEFTError(
                f"layers={layers!r} leaves nothing of target_modules={lost[0]!r}, which is "
                f"{listed(sorted(meant[lost[0]]))}. Leave it out, or name every module in full, without layers."
            )
        chosen = inside
    # A linear layer of another class than torch's is adapted by its weight.
    weight_of = {name: f"{name}.weight".lstrip(".") for name in chosen - candidates.keys()}
    chosen = {weight if (weight := weight_of.get(name, name)) in parameters else name for name in chosen}
    reasons = _reasons(model, {n: modules[n] for n in modules if n in chosen}, candidates, parameters, obstacle)
    # It weighs every parameter of the model, and nothing that is named is left out.
    frozen = left_frozen(model, chosen) - named if chosen - named else set()
    reasons |= {name: REASON for name in modules if name in frozen}
    if refused := [name for name in reasons if name in named]:
        raise PEFTError(f"{refused[0]!r} cannot be adapted: {reasons[refused[0]]}. Exclude it.")
    left_out = [
        f"{listed(repr(name) for name in reasons if reasons[name] == reason)}: {reason}"
        for reason in dict.fromkeys(reasons.values())
    ]
    chosen -= reasons.keys()
    if not chosen:
        raise PEFTError(
            f"No module is left to adapt: target_modules={targets!r}, exclude_modules={exclude!r}, layers={layers!r} "
            f"leave nothing{''.join(f' ({text})' for text in left_out)}. Drop one of the restrictions."
        )
    for text in left_out:
        model.remark(f"target_modules={targets!r} leaves out {text}.")
    return {name: module for name, module in candidates.items() if name in chosen}


def _matched(
    model: ModelView,
    targets: Names,
    modules: Mapping[str, nn.Module],
    candidates: Mapping[str, nn.Module],
    nothing: Callable[[str], str],
) -> dict[str, set[str]]:
    """Return the modules that each pattern, or preset, names."""
    meant: dict[str, set[str]] = {}
    matching, by_alias = (
        Matcher(candidates),
        Matcher(alias for alias, name in model.aliases.items() if name in candidates),
    )
    for pattern in dict.fromkeys(as_list(targets)):
        if pattern in PRESETS:
            found = set(in_preset(model, pattern))
            if not found:
                raise PEFTError(nothing(pattern))
        else:
            found = matching(pattern) | {model.aliases[alias] for alias in by_alias(pattern)}
            if not found:
                raise PEFTError(nothing_matched(pattern, modules, candidates))
        meant[pattern] = found
    return meant


def _reasons(
    model: ModelView,
    chosen: Mapping[str, nn.Module],
    candidates: Mapping[str, nn.Module],
    parameters: Mapping[str, nn.Module],
    obstacle: Callable[[str, nn.Module], str | None] | None,
) -> dict[str, str]:
    """Return those of ``chosen`` that cannot be adapted, each with the reason."""
    uncalled, found = uncalled_modules(model), dict[str, str]()
    for name, module in chosen.items():
        reason: str | None
        if name in parameters:
            reason = None if obstacle is None else obstacle(name, module)
        elif name in uncalled:
            reason = (
                "nn.MultiheadAttention reads its weight and never calls it, so an adapter would have no effect; LoRA "
                "adapts the nn.MultiheadAttention itself"
            )
        elif name not in candidates:
            reason = f"the method adapts no {type(module).__name__}"
        else:
            reason = plain.obstacle(module) or (None if obstacle is None else obstacle(name, module))
        if reason is not None:
            found[name] = reason
    return found
