"""Where the attention and the MLP of every layer are, found by a model's structure.

A block is addressed by two modules that are called in every architecture: the *first* one, whose input is what the
block is given, and the *last* one, whose output is what the block gives before dropout, residual connection and norm.
They are the query (or fused) projection and the output projection of attention, the first and the last linear layer of
an MLP, wherever these stand: in modules of their own (Llama), in two with the residual inside (BERT, BLOOM), or in the
layer itself (OPT). Where a block has no linear layers that are called, it is the first and the last module in one: a
mixture of experts, and ``nn.MultiheadAttention``.

Attention is known by its name (``self_attn``, ``attention``, ``EncDecAttention``); a layer is the smallest module
around it that has other linear layers or experts, which are its MLP.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from lightning_peft.core.view import ModelView, once
from lightning_peft.errors import PEFTError
from lightning_peft.structure.attention import attention_roots, mlp_beside, refuse_mixed, role_of, surrounding
from lightning_peft.structure.frozen import left_frozen
from lightning_peft.structure.inner_models import head_modules
from lightning_peft.structure.layers import in_layers
from lightning_peft.tensors.sharding import full_shape
from lightning_peft.tensors.weights import features, is_linear

Kind = Literal["attention", "mlp"]


@dataclass(frozen=True)
class Block:
    """An attention or MLP block. All names are relative to the model that was searched."""

    kind: Kind
    layer: str
    """The layer that it is a part of."""
    first: str
    """The module whose input is the block's input."""
    last: str
    """The module whose output is the block's output, without the residual."""
    width: int
    """Size of the hidden state that it gets and gives."""
    inputs: tuple[str, ...] = ()
    """Of an MLP: the linear layers that get the block's input (gate and up projection)."""
    roles: Mapping[str, str] = field(default_factory=dict)
    """Of attention: its projections by role, ``q``, ``k``, ``v`` (or ``qkv``, ``kv``) and ``o``."""


def find_blocks(
    model: ModelView, kinds: Iterable[Kind] = ("attention", "mlp"), layers: str | Sequence[int] | None = None
) -> list[Block]:
    """Return the blocks of ``model``, in the order of its modules.

    Args:
        model: Any model.
        kinds: Which blocks.
        layers: Layers to stay in: indices, or a slice such as ``"8:16"``.

    Raises:
        PEFTError: There is none of one of the kinds, one that is not told from the other, an MLP of which the form is
            unknown, or no such layer.
    """
    refuse_mixed(model)
    every = _every_block(model)
    left = left_frozen(model, [block.last for block in every])
    blocks = [block for block in every if block.last not in left]
    if "mlp" in kinds:
        _refuse_unknown_mlp(model, blocks, layers)
    for kind in kinds:
        if not any(block.kind == kind for block in blocks):
            raise PEFTError(f"No {kind} block was found in this {model.kind}. Name modules to adapt in target_modules.")
    named = [_with_layer_module(block, model.modules) for block in blocks if block.kind in set(kinds)]
    wanted = set(in_layers(model, [block.last for block in named], layers))
    return [block for block in named if block.last in wanted]


@once
def shared_inputs(model: ModelView) -> list[tuple[str, ...]]:
    """Return the names of linear layers that are given the same input, together, in the order of their calls.

    These are the query, key and value projections, and the gate and up projections. In cross-attention keys and values
    have an input of their own, which no name tells.
    """
    groups = [
        tuple(block.roles[role] for role in ("q", "k", "v") if role in block.roles) or block.inputs
        for block in _every_block(model)
    ]
    return [names for names in groups if len(names) > 1]


@once
def _every_block(model: ModelView) -> list[Block]:
    modules = model.modules
    order = {name: position for position, name in enumerate(modules)}
    roots = attention_roots(model)
    heads = head_modules(model)
    linears = {n: m for n, m in modules.items() if is_linear(m) and id(m) not in heads}
    beside = mlp_beside(model)
    projections = _by_surrounding(n for n in linears if n not in beside)
    others = _by_surrounding(n for n in linears if n in beside or not any(part in roots for part in surrounding(n)))
    experts = _by_surrounding(_experts(modules))
    attentions = _by_surrounding(roots)
    found: dict[tuple[str, str], Block] = {}
    for root in roots:
        layer = root if root in beside.values() else _layer_of(root, attentions, {*others, *experts})
        attention = _attention(modules, linears, root, layer, projections.get(root, []))
        if attention is not None:
            found[root, "attention"] = attention
            mlp = _mlp(linears, others.get(layer, []), experts.get(layer, []), layer, attention.width)
            if mlp is not None:
                found[layer, "mlp"] = mlp
    return sorted(found.values(), key=lambda block: order[block.last])


@once
def layer_norms(model: ModelView) -> dict[str, nn.Module]:
    """Return the LayerNorms and RMSNorms of ``model``, of torch or of the model's own making, by name."""
    return {
        name: module
        for name, module in model.modules.items()
        if isinstance(module, nn.LayerNorm) or type(module).__name__.endswith(("LayerNorm", "RMSNorm"))
        if any(True for _ in module.parameters(recurse=False))
    }


def widths(model: ModelView, name: str) -> tuple[int, int]:
    """Return the sizes of what the module ``name`` gets and gives, in its last dimension.

    Of a module with several linear layers these are the first one's input and the last one's output.

    Raises:
        PEFTError: It has no linear layers.
    """
    module = model.modules[name]
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim, module.embed_dim
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, module.embedding_dim
    sizes = [features(part) for part in model.part(name).modules.values() if is_linear(part)]
    if not sizes:
        raise PEFTError(
            f"{name!r} is a {type(module).__name__} without linear layers: the size of its hidden state is not known. "
            "Name a linear layer, or a module with some."
        )
    return sizes[0][0], sizes[-1][1]


def _by_surrounding(names: Iterable[str]) -> dict[str, list[str]]:
    """Return those of ``names`` that are inside a module, or are it, by its name."""
    found: dict[str, list[str]] = {}
    for name in names:
        for around in surrounding(name):
            found.setdefault(around, []).append(name)
    return found


def _experts(modules: Mapping[str, nn.Module]) -> set[str]:
    """Names of modules that hold experts: several 3-D parameters, or a list called ``experts``."""
    return {
        name
        for name, module in modules.items()
        if sum(p is not None and len(full_shape(p)) == 3 for p in module._parameters.values()) > 1
        or (isinstance(module, nn.ModuleList) and name.rsplit(".", 1)[-1] == "experts")
    }


def _refuse_unknown_mlp(model: ModelView, blocks: Sequence[Block], layers: str | Sequence[int] | None) -> None:
    """Raise :class:`PEFTError` if a layer has matrices beside attention, but no linear layers or experts with them."""
    attention = {block.last: block.layer for block in blocks if block.kind == "attention"}
    with_mlp = {block.layer for block in blocks if block.kind == "mlp"}
    without = {attention[last] for last in in_layers(model, attention, layers)} - with_mlp
    roots = attention_roots(model) if without else {}
    for name, module in model.modules.items():
        shapes = [list(p.shape) for p in module._parameters.values() if p is not None and p.dim() > 1]
        around = surrounding(name)
        layer = next((part for part in around if part in without), None)
        if shapes and layer is not None and not is_linear(module) and not any(part in roots for part in around):
            raise PEFTError(
                f"The MLP of {layer!r} has a form that is not known: {name!r} is a {type(module).__name__} with "
                f"parameters of shape {', '.join(map(str, shapes))}; linear layers, a list of experts, or experts in "
                "several 3-D parameters of one module were expected. Name modules to adapt in target_modules, or leave "
                "the layer out with layers."
            )


def _layer_of(root: str, attentions: Mapping[str, list[str]], with_others: set[str]) -> str:
    """Return the smallest module around ``root`` that has more than attention, or the module around it if none has."""
    parent = nearest = root.rpartition(".")[0]
    while True:
        # A layer has one attention block, or two in a decoder; whatever has more is a stack of layers.
        if len(attentions[parent]) > 2:
            return nearest
        if parent in with_others:
            return parent
        if not parent:
            return nearest
        parent = parent.rpartition(".")[0]


def _attention(
    modules: Mapping[str, nn.Module], linears: Mapping[str, nn.Module], root: str, layer: str, names: Iterable[str]
) -> Block | None:
    module = modules[root]
    if isinstance(module, nn.MultiheadAttention):
        return Block("attention", layer, root, root, module.embed_dim)
    roles: dict[str, str] = {}
    for name in names:
        role = role_of(name.rsplit(".", 1)[-1])
        # The last one that is no projection of the input is the output's; of the others the first is the plain one.
        if role == "o" or role not in roles:
            roles[role] = name
    first = next((roles[role] for role in ("q", "qkv", "kv") if role in roles), None)
    if first is None or "o" not in roles:
        return None
    return Block("attention", layer, first, roles["o"], features(linears[first])[0], roles=roles)


def _mlp(
    linears: Mapping[str, nn.Module], names: Sequence[str], mixtures: Sequence[str], layer: str, width: int
) -> Block | None:
    if mixtures:
        mixture = min(mixtures, key=len).rpartition(".")[0]
        return Block("mlp", layer, mixture, mixture, width)
    inputs = [name for name in names if features(linears[name])[0] == width]
    outputs = [name for name in names if features(linears[name])[1] == width]
    # Where all sizes are equal the last linear layer is the output's.
    inputs = [name for name in inputs if name != outputs[-1]] if outputs else []
    if not inputs:
        return None
    return Block("mlp", layer, inputs[0], outputs[-1], width, inputs=tuple(inputs))


def _with_layer_module(block: Block, modules: Mapping[str, nn.Module]) -> Block:
    """Return ``block`` with a layer that is called: T5 keeps the parts of a layer in a list."""
    layer = block.layer
    while isinstance(modules[layer], nn.ModuleList | nn.ModuleDict):
        layer = layer.rpartition(".")[0]
    return block if layer == block.layer else Block(**{**block.__dict__, "layer": layer})
