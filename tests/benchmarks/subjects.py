"""The models that are measured: shapes that matter, random weights; from hidden states to hidden states or a loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, LlamaModel, PretrainedConfig

LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BERT_TARGETS = ("query", "key", "value", "dense")
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def smollm2_config(layers: int = 30) -> LlamaConfig:
    """SmolLM2-135M."""
    return LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )


def llama_config(size: str, layers: int | None = None) -> LlamaConfig:
    """Llama 2 ``7B`` or ``70B``; with ``layers``, that many of its layers."""
    hidden, inner, depth, heads, groups = {
        "7B": (4096, 11008, 32, 32, 32),
        "70B": (8192, 28672, 80, 64, 8),
    }[size]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=depth if layers is None else layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=32000,
    )


def minilm_config() -> BertConfig:
    """all-MiniLM-L6, without dropout of its own."""
    return BertConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=12,
        **NO_DROPOUT,
    )


class Subject(nn.Module):
    """A model that is called with hidden states ``[batch, tokens, width]``, as in the middle of a stack of layers."""

    def __init__(self, model: nn.Module, targets: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.targets = model, targets

    def forward(self, hidden: Tensor) -> Tensor:
        result = self.model(inputs_embeds=hidden)
        if not hasattr(result, "logits"):
            return result.last_hidden_state
        logits = result.logits.flatten(0, -2)
        # Any labels do: what they are changes neither time nor memory.
        return nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


class Stack(nn.Sequential):
    """Linear layers of which none shares its input."""

    targets = ("linear",)

    def __init__(self, width: int = 64, layers: int = 4) -> None:
        super().__init__(*[nn.Sequential() for _ in range(layers)])
        for part in self:
            part.add_module("linear", nn.Linear(width, width, bias=False))
            part.add_module("gelu", nn.GELU())


@dataclass(frozen=True)
class Shape:
    """A model and the input that it is measured with."""

    config: PretrainedConfig
    batch: int
    tokens: int

    def build(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Subject:
        kind, targets = _kind(self.config)
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(0)
            model = kind(self.config).to(dtype)
        return Subject(model, targets).train()

    def inputs(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        width = self.config.hidden_size
        hidden = torch.randn(self.batch, self.tokens, width, generator=generator)
        return hidden.to(device, dtype).requires_grad_()


def _kind(config: PretrainedConfig) -> tuple[Callable[[Any], nn.Module], tuple[str, ...]]:
    if isinstance(config, BertConfig):
        return lambda c: BertModel(c, add_pooling_layer=False), BERT_TARGETS
    # A cut of a large model stands for its layers: without the head.
    return (LlamaForCausalLM if config.tie_word_embeddings else LlamaModel), LLAMA_TARGETS


def shapes(quick: bool, device: str = "cpu", model: str = "") -> dict[str, Shape]:
    """The models of the tables whose name holds ``model``; small cuts and few tokens with ``quick``."""
    return {name: shape for name, shape in _shapes(quick, device).items() if model in name}


def _shapes(quick: bool, device: str) -> dict[str, Shape]:
    if device != "cpu":
        layers, tokens = (1, 512) if quick else (4, 4096)
        return {
            f"Llama-7B, {layers} layers, {tokens:,} tokens": Shape(llama_config("7B", layers), 1, tokens),
            "SmolLM2-135M, 8 layers, 4 x 2,048 tokens": Shape(smollm2_config(8), 4, 2048),
            "SmolLM2-135M, 8 layers, 4 x 128 tokens": Shape(smollm2_config(8), 4, 128),
            "MiniLM encoder, 4 x 128 tokens": Shape(minilm_config(), 4, 128),
        }
    if quick:
        return {
            "SmolLM2-135M, 2 layers": Shape(smollm2_config(2), 1, 64),
            "MiniLM encoder": Shape(minilm_config(), 1, 64),
        }
    return {
        "SmolLM2-135M, 8 layers": Shape(smollm2_config(8), 4, 128),
        "MiniLM encoder": Shape(minilm_config(), 4, 128),
        "Llama-7B, 1 layer": Shape(llama_config("7B", 1), 1, 512),
        # On a CPU a step of 512 tokens takes half a minute.
        "Llama-70B, 1 layer, 64 tokens": Shape(llama_config("70B", 1), 1, 64),
    }


def sharing_weights(subject: nn.Module) -> Any:
    """Return a copy of ``subject`` with modules of its own and the same weights."""
    return copy.deepcopy(subject, {id(tensor): tensor for tensor in [*subject.parameters(), *subject.buffers()]})
