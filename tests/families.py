"""Tiny randomly initialised models of the architectures that are tested, each with an input; equal on every call."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as t
from torch import nn

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
GQA = {**SMALL, "num_key_value_heads": 2}


def _ids() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(1, 50, (2, 7))}


FAMILIES: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "llama": lambda: (t.LlamaForCausalLM(t.LlamaConfig(**GQA)), _ids()),
    "gpt2": lambda: (t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50)), _ids()),
    "bert": lambda: (t.BertForSequenceClassification(t.BertConfig(**SMALL)), _ids()),
    "t5": lambda: (
        t.T5ForConditionalGeneration(
            t.T5Config(d_model=32, d_ff=64, num_layers=2, num_heads=4, d_kv=8, vocab_size=50, decoder_start_token_id=0)
        ),
        {**_ids(), "decoder_input_ids": torch.randint(1, 50, (2, 5))},
    ),
    "qwen2": lambda: (t.Qwen2ForCausalLM(t.Qwen2Config(**GQA)), _ids()),
    "qwen3": lambda: (t.Qwen3ForCausalLM(t.Qwen3Config(**GQA, head_dim=8)), _ids()),
    "gemma3": lambda: (t.Gemma3ForCausalLM(t.Gemma3TextConfig(**GQA, head_dim=8)), _ids()),
    "vit": lambda: (
        t.ViTForImageClassification(
            t.ViTConfig(**{k: v for k, v in SMALL.items() if k != "vocab_size"}, image_size=16, patch_size=8)
        ),
        {"pixel_values": torch.randn(2, 3, 16, 16)},
    ),
    "sequential": lambda: (
        nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)),
        {"input": torch.randn(3, 8)},
    ),
}


def build(family: str) -> tuple[nn.Module, dict[str, Any]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, inputs = FAMILIES[family]()
    return model.eval(), inputs


def outputs(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    result = model(**inputs)
    return result if isinstance(result, torch.Tensor) else result.logits


def randomise(model: nn.Module) -> None:
    """Give what is trained values that matter."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)
