"""Which modules are attention, and what the linear layers in it compute. All that is known of names stands here."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import regex
from torch import nn

from lightning_peft.core.view import ModelView, once
from lightning_peft.core.weights import is_linear

_ATTENTION = regex.compile(r"(^|.*_)(attn|attention|selfattention|encdecattention)$", regex.IGNORECASE)

# What projections are called: `q`, `q_proj`, `query`, `q_lin`; `qkv_proj`, `query_key_value`, `c_attn`, `Wqkv`.
_ROLES = {"q": "q|query|wq", "k": "k|key|wk", "v": "v|value|wv", "qkv": "w?qkv|attn|in", "kv": "w?kv"}


def is_attention_name(segment: str) -> bool:
    """Whether a segment of a module's name is one that attention blocks have."""
    return _ATTENTION.match(segment) is not None


@cache
def role_of(segment: str) -> str:
    """Return what a linear layer so called computes in attention: ``q``, ``k``, ``v``, ``qkv``, ``kv`` or ``o``."""
    tokens = regex.split(r"[^a-z]+", segment.lower())
    roles = [role for role, names in _ROLES.items() if any(regex.fullmatch(names, token) for token in tokens)]
    if {"q", "k", "v"} <= set(roles):
        return "qkv"
    return roles[0] if roles else "o"


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
