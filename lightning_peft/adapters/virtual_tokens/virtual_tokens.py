"""What prefix and prompt tuning share: finding the decoder, and making room for virtual tokens in its inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.view import ModelView
from lightning_peft.errors import PEFTError
from lightning_peft.structure.attention import is_attention_name
from lightning_peft.structure.inner_models import transformers_models
from lightning_peft.tensors.sharding import in_zero_pieces

# transformers renames the argument: `cache` since 5.24, `layer_past` inside some attention blocks.
_CACHE_NAMES = ("cache", "past_key_values", "layer_past")


@dataclass(frozen=True)
class Decoder:
    """The part of a decoder-only model that embeds tokens, makes masks and runs the layers."""

    name: str
    module: nn.Module
    attention: dict[str, nn.Module]
    """The attention blocks of its layers, in order, by name."""
    around: str
    """Name of the transformers model that it is in, or is."""

    @property
    def config(self) -> Any:
        """Its transformers configuration."""
        return self.module.config

    def layers(self) -> list[str]:
        """Return the names of its layers, in order: what holds the attention blocks."""
        return [name.rpartition(".")[0] for name in self.attention]


def find_decoder(model: ModelView, method: str) -> Decoder:
    """Return the decoder of the one transformers model in ``model``.

    Raises:
        PEFTError: There is none, or several, or the model is not decoder-only.
    """
    found = transformers_models(model)
    if len(found) != 1:
        advice = f"holds {len(found)} of them. Inject into the one that is meant." if found else "is none. Use LoRA."
        raise PEFTError(f"{method} works on decoder-only transformers models; this {model.kind} {advice}")
    ((root_name, root),) = found.items()
    modules = model.modules
    attention = {
        name: module
        for name, module in modules.items()
        if name.startswith(f"{root_name}.".lstrip("."))
        and is_attention_name(name.rsplit(".", 1)[-1])
        and cache_parameter(module) is not None
    }
    # Some models call what is inside their base model (OPT): the innermost one around all blocks makes the masks.
    around = [
        name
        for name, module in modules.items()
        if cache_parameter(module) is not None
        and hasattr(module, "get_input_embeddings")
        and all(block.startswith(f"{name}.".lstrip(".")) for block in attention)
    ]
    if reason := "takes no key-value cache" if not around else _no_decoder(root, attention):
        raise PEFTError(
            f"{method} works on decoder-only transformers models; this {type(root).__name__} {reason}. Take another "
            "method, such as LoRA."
        )
    return Decoder(around[-1], modules[around[-1]], attention, root_name)


def require_tokens(method: str, number: int, what: str = "num_virtual_tokens") -> None:
    """Raise :class:`PEFTError` unless ``number`` is a number of virtual tokens."""
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise PEFTError(f"{method}: {what}={number!r} was given; it is a whole number of at least 1.")


def require_room(method: str, number: int, decoder: Decoder) -> None:
    """Raise :class:`PEFTError` if ``number`` virtual tokens leave no position for the text."""
    positions = getattr(decoder.config, "max_position_embeddings", None)
    if isinstance(positions, int) and number >= positions:
        raise PEFTError(
            f"{method}: {number} virtual tokens were asked for, but the model has {positions} positions, and the text "
            "needs some. Take fewer."
        )


def refuse_call(method: str, base: Any, named: Mapping[str, Any], cache: Any, number: int, *, cached: bool) -> None:
    """Refuse a call of the decoder that cannot be right with ``number`` virtual tokens.

    Args:
        method: Name of the method, for errors.
        base: The decoder.
        named: The arguments of its call.
        cache: The key-value cache among them.
        number: How many.
        cached: Whether a filled cache holds them.

    Raises:
        PEFTError: The model has a table of positions that is too short for them and the text, or there is a filled
            cache, which transformers drops under activation checkpointing.
    """
    held = 0 if cache is None else int(cache.get_seq_length())
    text = named["inputs_embeds"] if named.get("input_ids") is None else named["input_ids"]
    limit = getattr(base.config, "max_position_embeddings", None)
    taken = text.shape[1] + held + (0 if cached and held else number)
    if limit is not None and taken > limit and _has_position_table(base):
        raise PEFTError(
            f"{method}: the text and {number} virtual tokens take {taken} positions, but the model has a table of "
            f"{limit}. Cut the texts to {limit - number} tokens, or take fewer virtual tokens."
        )
    if held and base.training and base.is_gradient_checkpointing and torch.is_grad_enabled():
        raise PEFTError(
            f"{method}: a cache of {held} tokens was given while activations are checkpointed, which drops it. Turn "
            "one of the two off."
        )


def _has_position_table(base: Any) -> bool:
    tokens = base.get_input_embeddings()
    return any(isinstance(child, nn.Embedding) and child is not tokens for child in base.children())


def refuse_pieces(method: str, parameter: Tensor) -> None:
    """Raise :class:`PEFTError` if ZeRO-3 has cut ``parameter`` up, which it puts together for forward methods alone."""
    if in_zero_pieces(parameter):
        raise PEFTError(
            f"{method}: ZeRO-3 has the virtual tokens in pieces, and does not put them together before the model is "
            "called. Take deepspeed_stage_2, or FSDP."
        )


def cache_parameter(module: nn.Module) -> str | None:
    """Return what the forward method of ``module`` calls the key-value cache, if it takes one."""
    return next((name for name in _CACHE_NAMES if name in _parameters(type(module).forward)), None)


def by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Return the arguments of a call of ``module`` by name, without the cache, and the cache."""
    # torch 2.8 can compile neither a zip of unequal lengths nor `next` with a default.
    names = _parameters(type(module).forward)[: len(args)]
    named = {**dict(zip(names, args[: len(names)], strict=True)), **kwargs}
    given = [value for name in _CACHE_NAMES if (value := named.pop(name, None)) is not None]
    return named, given[0] if given else None


def cache_of(output: Any) -> Any:
    """Return the cache in a decoder's output, if there is one."""
    return next((output[name] for name in _CACHE_NAMES if name in output), None)


def widened(mask: Any, number: int) -> Tensor | None:
    """Return an attention mask with ``number`` more columns in front that everything may attend to.

    Args:
        mask: ``None``, ``[batch, tokens]`` or ``[batch, heads, queries, keys]``.
        number: How many.

    Raises:
        PEFTError: ``mask`` is something else.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        raise PEFTError(
            f"Virtual tokens cannot be added to an attention mask that is a {type(mask).__name__}"
            + (f" of shape {list(mask.shape)}" if isinstance(mask, Tensor) else "")
            + "; one of shape [batch, tokens] was expected. Generate with a dynamic cache, without "
            "cache_implementation."
        )
    # A 4-D mask of floats is added to the scores.
    visible = 0 if mask.dim() == 4 and mask.is_floating_point() else 1
    return torch.cat([mask.new_full((*mask.shape[:-1], number), visible), mask], dim=-1)


def rebuilt(output: Any, change: Callable[[Any], Any]) -> Any:
    """Return a model's output, a tuple or a mapping that drops ``None``, with every element changed."""
    if isinstance(output, tuple):
        return tuple(value for value in map(change, output) if value is not None)
    return type(output)(**{key: change(value) for key, value in output.items()})


def _no_decoder(root: Any, attention: dict[str, nn.Module]) -> str:
    config = root.config
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        return "has an encoder"
    if config.get_text_config() is not config:
        return "has more than text as input"
    if any(not getattr(part, "is_causal", True) for block in attention.values() for part in block.modules()):
        return "attends to what follows"
    if len(attention) != config.num_hidden_layers:
        return f"has {len(attention)} attention blocks with a cache in {config.num_hidden_layers} layers"
    return ""


@cache
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]
