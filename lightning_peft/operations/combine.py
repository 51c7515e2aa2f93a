"""A new adapter made of several LoRAs."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import cast, get_args

import regex
import torch
from torch import Tensor, nn

from lightning_peft.adapters.low_rank.combination import How as How
from lightning_peft.adapters.low_rank.combination import Term, combined
from lightning_peft.adapters.low_rank.embedding import EmbeddingLoRAAdapter
from lightning_peft.adapters.low_rank.linear import LoRAAdapter
from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.registry import Registry, adapted, required
from lightning_peft.core.view import ModelView, is_inside
from lightning_peft.errors import PEFTError
from lightning_peft.methods.lora import LoRA
from lightning_peft.operations.inject import inject
from lightning_peft.operations.shards import resharded
from lightning_peft.targets.naming import targets_from
from lightning_peft.tensors.seeding import generator_of
from lightning_peft.tensors.sharding import replace, whole

Factors = dict[str, tuple[Tensor, Tensor]]


def combine(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    name: str,
    *,
    method: How = "cat",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> list[str]:
    """Make a new LoRA of several, which stay as they are; :func:`set_adapter` makes it run.

    The methods are those of HF PEFT's ``add_weighted_adapter``, with its results. For an adapter with the change of
    weights ΔW = s B A, and its weight w:

    - ``cat``: exactly Σ w ΔW; the rank is the sum of the ranks.
    - ``svd``: the matrix of rank ``rank`` that is nearest to Σ w ΔW.
    - ``linear``: A = Σ √(w s) A, B = Σ √(w s) B: of equal ranks, one of the same. It is not Σ w ΔW: the A of each
      adapter meets the B of every other.
    - ``magnitude_prune``: ``linear`` of the largest elements of each A and each B.
    - ``ties``: of the largest elements, the mean of those with the sign of their sum (arXiv:2306.01708).
    - ``dare_linear``: ``linear`` of elements drawn at random, divided by ``density`` (arXiv:2311.03099).
    - ``dare_ties``: of elements drawn so, the mean of those with the sign of their sum.
    - ``…_svd``: the last four, of ΔW instead of A and B, as in the papers; then as ``svd``. It forms ΔW.

    TIES elects signs before the weights count. The new LoRA's scale is 1, and a module that an adapter leaves alone
    counts as one that it does not change.

    Args:
        model: A model with the adapters, not merged.
        adapters: Their names.
        weights: A weight for each of them, of any sign.
        name: The new adapter's name.
        method: How to combine them.
        rank: The rank of the result, for ``svd`` and ``…_svd``; the largest of the adapters' ranks if not given.
        density: The part of the elements that is kept, for the methods that drop some: more than 0, at most 1.
        seed: What DARE draws depends on it and the module's name.

    Returns:
        The names of the new adapter's modules.

    Raises:
        PEFTError: An adapter does not exist or is no LoRA, or the arguments do not fit. Nothing has changed.
    """
    view = resharded(model)
    required(view)
    found = adapted(view)
    _check_adapters(found, adapters, weights, name)
    _check_method(method, rank, density)
    made: list[tuple[nn.Module, LoRA, Factors]] = []
    methods = {name: used for _, _, registry in found for name, used in registry.methods.items()}
    for prefix, module, _ in found:
        if any(prefix != outer and is_inside(prefix, {outer}) for outer, _, _ in found):
            continue  # its adapters are among those of what is around it
        root = view.part(prefix)
        factors = {
            host: _combine_host(host, terms, method, rank, 1.0 if density is None else density, seed)
            for host, terms in _terms(root, adapters, weights).items()
        }
        if factors:
            like = cast(LoRA, methods[adapters[0]][0])
            lora = lora_with(factors, root)
            lora = dataclasses.replace(lora, dropout=like.dropout, loraplus_lr_ratio=like.loraplus_lr_ratio)
            made.append((module, lora, factors))
    hosts: list[str] = []
    for module, lora, factors in made:
        hosts += inject(module, lora, name=name)
        set_factors(module, name, factors)
    return hosts


def set_factors(module: nn.Module, name: str, factors: Factors) -> None:
    """Give the LoRA ``name`` of ``module`` the matrices A and B, by the host's name."""
    for host, _, slot in ModelView(module).slots:
        for parameter, value in zip(("lora_A", "lora_B"), factors.get(host, ()), strict=False):
            replace(getattr(slot[name], parameter), value)


def _check_adapters(
    found: Sequence[tuple[str, nn.Module, Registry]], adapters: Sequence[str], weights: Sequence[float], name: str
) -> None:
    methods: dict[str, list[PEFTMethod]] = {}
    for _, _, registry in found:
        for adapter, used in registry.methods.items():
            methods.setdefault(adapter, []).extend(used)
    known = ", ".join(sorted(methods))
    if isinstance(adapters, str) or not adapters:
        raise PEFTError(f"combine: adapters={adapters!r} was given; a list of names was expected. Adapters: {known}.")
    for adapter in adapters:
        if adapter not in methods:
            raise PEFTError(f"There is no adapter {adapter!r}. Adapters: {known}.")
        if other := next((used for used in methods[adapter] if type(used) is not LoRA), None):
            raise PEFTError(
                f"combine: {adapter!r} is a {type(other).__name__}; only LoRAs can be combined. Leave it out."
            )
    if name in methods:
        raise PEFTError(f"The model already has an adapter {name!r}. Choose another name.")
    if len(weights) != len(adapters) or not all(math.isfinite(weight) for weight in weights):
        raise PEFTError(
            f"combine: weights={list(weights)!r} was given; a finite number for each of {', '.join(adapters)} was "
            "expected."
        )


def _check_method(method: str, rank: int | None, density: float | None) -> None:
    if method not in get_args(How):
        raise PEFTError(f"combine: method={method!r} was given; it is one of {', '.join(get_args(How))}.")
    if rank is not None and (not method.endswith("svd") or not isinstance(rank, int) or rank < 1):
        raise PEFTError(
            f"combine: rank={rank!r} was given with method={method!r}; a whole number of at least 1 was expected, with "
            "'svd' or a method that ends in it."
        )
    drops = method.startswith(("ties", "dare", "magnitude"))
    if drops != (density is not None) or (density is not None and not 0 < density <= 1):
        wanted = "a number greater than 0, at most 1," if drops else "none"
        raise PEFTError(f"combine: density={density!r} was given with method={method!r}; {wanted} was expected.")


def _terms(root: ModelView, adapters: Sequence[str], weights: Sequence[float]) -> dict[str, list[Term]]:
    """Return what is combined, by the name of the module."""
    found: dict[str, list[Term]] = {}
    for host, _, slot in root.slots:
        for name, weight in zip(adapters, weights, strict=True):
            if (adapter := slot._modules.get(name)) is None:
                continue
            # Others are more than B A: they start elsewhere, concern a part of the host, or several weights.
            if not (isinstance(adapter, LoRAAdapter) and type(adapter) in (LoRAAdapter, EmbeddingLoRAAdapter)):
                raise PEFTError(
                    f"combine: {name!r} has a {type(adapter).__name__} on {host!r}; adapters of linear layers and "
                    "embeddings that start at zero can be combined. Leave it out."
                )
            a, b = (whole(m).to(torch.promote_types(m.dtype, torch.float32)) for m in (adapter.lora_A, adapter.lora_B))
            found.setdefault(host, []).append(Term(a, b, adapter.scale, weight))
    return found


def _combine_host(
    host: str, terms: Sequence[Term], method: How, rank: int | None, density: float, seed: int
) -> tuple[Tensor, Tensor]:
    ranks = sorted({len(term.a) for term in terms})
    if len(ranks) > 1 and not (method == "cat" or method.endswith("svd")):
        raise PEFTError(
            f"combine: the adapters of {host!r} have the ranks {', '.join(map(str, ranks))}, but {method!r} adds "
            "matrices of one shape. Take 'cat', 'svd' or a method that ends in 'svd'."
        )
    largest = min(terms[0].a.shape[1], len(terms[0].b))
    return combined(terms, method, min(rank or ranks[-1], largest), density, generator_of(seed, host))


def lora_with(factors: Factors, root: ModelView) -> LoRA:
    """Return the LoRA whose adapters hold ``factors`` at scale 1."""
    ranks = {host: len(a) for host, (a, _) in factors.items()}
    r = Counter(ranks.values()).most_common(1)[0][0]
    patterns = {f"re:{regex.escape(host, special_only=True)}": rank for host, rank in ranks.items() if rank != r}
    return LoRA(
        r=r,
        alpha=r,
        rank_pattern=patterns,
        alpha_pattern=dict(patterns),
        target_modules=targets_from(factors, root),
    )
