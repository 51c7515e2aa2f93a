"""From patterns to modules: what to adapt. A pattern that matches nothing is an error with near names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import nn

from lightning_peft.core.view import ModelView
from lightning_peft.core.weights import is_linear
from lightning_peft.errors import PEFTError
from lightning_peft.targets.attention import attention_roots, surrounding
from lightning_peft.targets.inner_models import head_modules
from lightning_peft.targets.layers import in_layers, listed_blocks
from lightning_peft.targets.patterns import ALL_LINEAR, PRESETS, Names, as_list, match_names, matches, nothing_matched


def select(
    model: ModelView,
    targets: Names,
    *,
    adaptable: Callable[[nn.Module], bool],
    weights: Callable[[nn.Module], Iterable[str]] | None = None,
    exclude: Names | None = None,
    layers: str | Sequence[int] | None = None,
) -> dict[str, nn.Module]:
    """Return the modules of ``model`` that ``targets`` name, by name, in the model's order.

    Args:
        model: Where to look.
        targets: ``"all-linear"`` (without the output head), ``"attention"``, ``"mlp"``, or patterns (see
            :func:`matches`), mixed at will.
        adaptable: Whether the method can adapt a module. Others are passed over, unless a pattern matches nothing
            else.
        weights: Gives the names of parameters of a module that can be adapted one by one. They are selected by their
            own name, ``experts.down_proj``, and returned by it, with that module.
        exclude: Patterns of modules to leave out.
        layers: Indices of blocks to adapt, or a slice (``"8:16"``, ``"-4:"``). Modules outside blocks go.

    Raises:
        PEFTError: A pattern matches nothing (the nearest names are listed), only modules that cannot be adapted,
            or a layer does not exist.
    """
    modules: dict[str, nn.Module] = dict(model.modules)
    candidates = {name: module for name, module in modules.items() if adaptable(module)}
    uncalled = _uncalled(modules)
    parameters = {
        f"{name}.{weight}".lstrip("."): module
        for name, module in modules.items()
        for weight in (() if weights is None or name in candidates else weights(module))
    }
    modules, candidates = modules | parameters, candidates | parameters
    chosen: set[str] = set()
    for pattern in as_list(targets):
        if pattern in PRESETS:
            found = _preset(model, candidates, pattern) - uncalled
        else:
            found = match_names(pattern, candidates)
            found |= {name for alias, name in model.aliases.items() if name in candidates and matches(pattern, alias)}
        if not found:
            raise PEFTError(nothing_matched(pattern, modules, candidates))
        chosen |= found
    for pattern in as_list(exclude or ()):
        found = match_names(pattern, modules)
        if not found:
            raise PEFTError(nothing_matched(pattern, modules, candidates, what="exclude_modules"))
        chosen -= found
    if layers is not None:
        chosen &= set(in_layers(model, chosen, layers))
    if refused := sorted(chosen & uncalled):
        raise PEFTError(
            f"{refused[0]!r} cannot be adapted: nn.MultiheadAttention reads its weight and never calls it, so an "
            f"adapter would have no effect. Leave it out with exclude_modules={refused!r}; LoRA adapts the "
            "nn.MultiheadAttention itself."
        )
    if not chosen:
        raise PEFTError(
            f"No module is left to adapt: target_modules={targets!r}, exclude_modules={exclude!r}, layers={layers!r} "
            "leave nothing. Drop one of the restrictions."
        )
    return {name: module for name, module in candidates.items() if name in chosen}


def _preset(model: ModelView, candidates: Mapping[str, nn.Module], preset: str) -> set[str]:
    heads = head_modules(model)
    linears = {
        name
        for name, m in candidates.items()
        if isinstance(m, nn.MultiheadAttention) or (is_linear(m) and id(m) not in heads)
    }
    if preset == ALL_LINEAR:
        return linears
    attention = {name for name in linears if any(around in attention_roots(model) for around in surrounding(name))}
    return attention if preset == "attention" else (linears & listed_blocks(model).keys()) - attention


def _uncalled(modules: Mapping[str, nn.Module]) -> set[str]:
    """Names of modules whose parent reads their weight instead of calling them: no hook of theirs ever runs."""
    return {
        f"{name}.out_proj" if name else "out_proj"
        for name, module in modules.items()
        if isinstance(module, nn.MultiheadAttention)
    }
