"""A copy of a LoRA directory that every reader scales alike.

Readers differ in what they take from ``adapter_config.json``: some compute the scale as ``lora_alpha / r`` and know
neither rsLoRA nor the patterns, some take ``lora_alpha`` alone and the rank from the tensors. A copy whose scale is 1
by all of these rules leaves them nothing to get wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_peft.errors import PEFTError
from lightning_peft.formats.counterparts.lora import LowRank, read_low_rank

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's ``max_lora_rank`` can be."""

_COPY = ".base_layer.weight"


def serving_copy(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    source: str,
    *,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return configuration and tensors of the copy: scales folded into B, one rank, ``lora_alpha`` equal to it.

    Copies of base weights, which HF PEFT writes beside adapted embeddings, are taken over: HF PEFT reads them, others
    pass them over.

    Args:
        config: The adapter's configuration.
        tensors: Its tensors by name; A ``[r, in]``, B ``[out, r]``.
        source: What to call it in errors.
        rank: The rank to pad to with zeros, one of ``RANKS``; the largest rank of the adapter, if not given.
        dtype: Of A and B in the copy; the adapter's own, if not given. Folding is computed in float32.

    Raises:
        PEFTError: It is no plain LoRA, trains modules whole, has a larger rank, or does not fit the dtype.
    """
    found, rest = read_low_rank(config, {name: tuple(t.shape) for name, t in tensors.items()}, source)
    _refuse_whole(config, rest, found, source)
    padded = _rank(max(pair.r for pair in found.values()), rank, source)
    copied = {name: tensors[name] for name in rest}
    for host, pair in found.items():
        a, b = tensors[pair.a], tensors[pair.b]
        more = padded - pair.r
        copied[pair.a] = functional.pad(a, (0, 0, 0, more)).to(dtype or a.dtype)
        copied[pair.b] = functional.pad(b.float() * pair.scale, (0, more)).to(dtype or b.dtype)
        if not (torch.isfinite(copied[pair.a]).all() and torch.isfinite(copied[pair.b]).all()):
            raise PEFTError(
                f"{source}: the adapter of {host!r} holds NaN or infinity, or values too large for "
                f"{copied[pair.b].dtype}. Take dtype float32 or bfloat16, or an earlier checkpoint."
            )
    return _config(config, padded, found), copied


def _config(config: Mapping[str, Any], rank: int, hosts: Iterable[str]) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        **{key: config.get(key) for key in ("task_type", "base_model_name_or_path", "revision")},
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": _targets(config, hosts),
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "modules_to_save": None,
        "bias": "none",
        "fan_in_fan_out": bool(config.get("fan_in_fan_out")),
        "init_lora_weights": True,
    }


def _targets(config: Mapping[str, Any], hosts: Iterable[str]) -> list[str]:
    """Return last name segments if they name the adapted modules and no others, else whole names.

    Without the model that is known only where the adapter itself was made from last segments, without restrictions.
    """
    given = config.get("target_modules")
    restricted = any(config.get(key) is not None for key in ("layers_to_transform", "layers_pattern"))
    leaves = {host.rpartition(".")[2] for host in hosts}
    if isinstance(given, list) and leaves <= set(given) and not restricted and not config.get("exclude_modules"):
        return sorted(leaves)
    return sorted(hosts)


def _rank(largest: int, rank: int | None, source: str) -> int:
    if rank is None:
        return largest
    if rank not in RANKS:
        raise PEFTError(f"rank={rank} was given; vLLM serves {', '.join(map(str, RANKS))}. Take one of them.")
    if rank < largest:
        raise PEFTError(
            f"rank={rank} was given, but {source} has modules of rank {largest}: an export pads and never cuts. Take "
            f"{next((r for r in RANKS if r >= largest), 'none')} or more."
        )
    return rank


def _refuse_whole(config: Mapping[str, Any], rest: Iterable[str], found: Mapping[str, LowRank], source: str) -> None:
    """Refuse modules trained whole: beside A and B, only copies of the weights that these adapt may be there."""
    listed = config.get("modules_to_save")
    lead = {pair.a.partition(host)[0] for host, pair in found.items()}
    copies = {f"{prefix}{host}{_COPY}" for prefix in lead for host in found}
    if listed or (others := sorted(set(rest) - copies)):
        what = f"modules_to_save={listed!r}" if listed else f"the tensor {others[0]!r}"
        raise PEFTError(
            f"{source} has {what}, a part of the model that is trained whole: servers for LoRA ignore or refuse it. "
            "Write a whole model with `lightning-peft merge` and serve that."
        )
