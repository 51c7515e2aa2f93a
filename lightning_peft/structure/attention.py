"""Which modules are attention, and what the linear layers in it compute. All that is known of names stands here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import regex
from torch import nn

from lightning_peft.core.view import ModelView, once
from lightning_peft.errors import PEFTError, listed
from lightning_peft.tensors.weights import is_linear

_ATTENTION = regex.compile(r"(^|.*_)(attn|attention|selfattention|encdecattention)$", regex.IGNORECASE)

# Layers that pass information along a sequence by recurrence: those of RecurrentGemma, RWKV, Mamba and its relatives.
_RECURRENT = regex.compile(r"(^|.*_)(mamba|ssm|temporal_block|recurrent_block|time_mix(ing|er)?)$", regex.IGNORECASE)
_STATE_DECAY = "A_log"

# What projections are called: `q`, `q_proj`, `query`, `q_lin`; `qkv_proj`, `query_key_value`, `c_attn`, `Wqkv`.
_OUTPUTS = "o|wo|out|output|proj|dense"
_MLP = "up|down|gate|fc|ffn?|mlp|lin|linear|w"
_ROLES = {"q": "q|query|wq", "k": "k|key|wk", "v": "v|value|wv", "qkv": "w?qkv|attn|in", "kv": "w?kv"}


def is_attention_name(segment: str) -> bool:
    """Whether a segment of a module's name is one that attention blocks have."""
    return _ATTENTION.match(segment) is not None


@cache
def role_of(segment: str) -> str:
    """Return what a linear layer so called computes in attention: ``q``, ``k``, ``v``, ``qkv``, ``kv`` or ``o``."""
    roles = [role for role, names in _ROLES.items() if _has_token(segment, names)]
    if {"q", "k", "v"} <= set(roles):
        return "qkv"
    return roles[0] if roles else "o"


def _has_token(segment: str, names: str) -> bool:
    return any(regex.fullmatch(names, token) for token in regex.split(r"[^a-z]+", segment.lower()))


@once
def attention_roots(model: ModelView) -> Mapping[str, nn.Module]:
    """Return the outermost modules that are attention, by name.

    They are called so, are ``nn.MultiheadAttention``, or hold linear layers for queries, keys and values.
    """
    projecting = _projecting(model)
    roots: dict[str, nn.Module] = {}
    for name, module in model.modules.items():
        leaf = name.rpartition(".")[2]
        found = is_attention_name(leaf) or isinstance(module, nn.MultiheadAttention) or name in projecting
        if not (name and found) or any(around in roots for around in surrounding(name)):
            continue
        if any(True for _ in module.parameters()):
            roots[name] = module
    return roots


@once
def recurrent_roots(model: ModelView) -> Mapping[str, nn.Module]:
    """Return the modules that are recurrent layers, state-space models among them, by name."""
    return {
        name: module
        for name, module in model.modules.items()
        if _RECURRENT.match(name.rpartition(".")[2]) or _STATE_DECAY in module._parameters
    }


@once
def mlp_beside(model: ModelView) -> Mapping[str, str]:
    """Return the linear layers of an MLP that stand beside the projections of attention, with the module around both.

    Such a module is known as attention by the projections that it holds; the names of the rest tell what that is.
    """
    return {name: root for root, (outputs, mlp) in _rest(model).items() if outputs and _is_mlp(mlp) for name in mlp}


def refuse_mixed(model: ModelView) -> None:
    """Check that it is known what in a module with the projections of attention belongs to it.

    Raises:
        PEFTError: The names of its linear layers do not tell.
    """
    for root, (outputs, rest) in _rest(model).items():
        if rest and len(outputs) + len(rest) > 1 and not (outputs and _is_mlp(rest)):
            raise PEFTError(
                f"Attention and MLP cannot be told apart in {root!r}: what {listed(map(repr, rest))} belong to is not "
                "known. Name the layers to adapt in target_modules."
            )


def _rest(model: ModelView) -> dict[str, tuple[list[str], list[str]]]:
    """Return the linear layers but projections of what is attention by these alone: known as outputs, and others."""
    found = {}
    for root, module in attention_roots(model).items():
        if is_attention_name(root.rpartition(".")[2]) or isinstance(module, nn.MultiheadAttention):
            continue
        inside = [f"{root}.{name}" for name, part in model.part(root).modules.items() if is_linear(part)]
        others = [name for name in inside if role_of(name.rpartition(".")[2]) == "o"]
        outputs = [n for n in others if any(_has_token(part, _OUTPUTS) for part in n.removeprefix(root).split("."))]
        found[root] = outputs, [name for name in others if name not in outputs]
    return found


def _is_mlp(names: Sequence[str]) -> bool:
    return len(names) > 1 and all(_has_token(name.rpartition(".")[2], _MLP) for name in names)


def _projecting(model: ModelView) -> set[str]:
    """Names of modules of which linear layers are called query, key and value, each by a name of its own."""
    roles: dict[str, set[str]] = {}
    for name, module in model.modules.items():
        parent, _, leaf = name.rpartition(".")
        if is_linear(module):
            roles.setdefault(parent, set()).add(role_of(leaf))
    return {name for name, found in roles.items() if {"q", "k", "v"} <= found}


def surrounding(name: str) -> list[str]:
    """Return ``name`` and every module around it, the model itself last."""
    around = [name]
    while around[-1]:
        around.append(around[-1].rpartition(".")[0])
    return around
