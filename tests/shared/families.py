"""Tiny randomly initialised models of the architectures that are tested, each with an input; equal on every call."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers as t
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

# What transformers calls a cache; `past_key_values` before 5.24.
CACHE = "cache" if hasattr(CausalLMOutputWithPast(), "cache") else "past_key_values"

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
GQA = {**SMALL, "num_key_value_heads": 2}
VISION = {**{k: v for k, v in SMALL.items() if k != "vocab_size"}, "image_size": 16, "patch_size": 8}
SEQ2SEQ = {
    "vocab_size": 50,
    "d_model": 32,
    **{f"{part}_layers": 2 for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": 64 for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

Family = Callable[[], tuple[nn.Module, dict[str, Any]]]


def _ids() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, 50, (2, 7))}


def _both(**encoder: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**(encoder or _ids()), "decoder_input_ids": torch.randint(3, 50, (2, 5))}


def _pixels() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


def _sequential() -> tuple[nn.Module, dict[str, Any]]:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), {"input": torch.randn(3, 8)}


def _torch_encoder() -> tuple[nn.Module, dict[str, Any]]:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), {"src": torch.randn(2, 5, 32)}


def _torch_decoder() -> tuple[nn.Module, dict[str, Any]]:
    layer = nn.TransformerDecoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return nn.TransformerDecoder(layer, 2), {"tgt": torch.randn(2, 5, 32), "memory": torch.randn(2, 4, 32)}


def _clip() -> tuple[nn.Module, dict[str, Any]]:
    text = {**SMALL, **SPECIAL, "projection_dim": 16, "max_position_embeddings": 16}
    config = t.CLIPConfig(text_config=text, vision_config={**VISION, "projection_dim": 16}, projection_dim=16)
    return t.CLIPModel(config), {**_ids(), **_pixels()}


# A family is a function that makes a model and an input for it. `build` calls it with one seed.
FAMILIES: dict[str, Family] = {
    "llama": lambda: (t.LlamaForCausalLM(t.LlamaConfig(**GQA)), _ids()),
    "gpt2": lambda: (t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50)), _ids()),
    "bert": lambda: (t.BertForSequenceClassification(t.BertConfig(**SMALL)), _ids()),
    "t5": lambda: (
        t.T5ForConditionalGeneration(
            t.T5Config(d_model=32, d_ff=64, num_layers=2, num_heads=4, d_kv=8, vocab_size=50, decoder_start_token_id=0)
        ),
        _both(),
    ),
    "qwen2": lambda: (t.Qwen2ForCausalLM(t.Qwen2Config(**GQA)), _ids()),
    "qwen3": lambda: (t.Qwen3ForCausalLM(t.Qwen3Config(**GQA, head_dim=8)), _ids()),
    "gemma3": lambda: (t.Gemma3ForCausalLM(t.Gemma3TextConfig(**GQA, head_dim=8)), _ids()),
    "vit": lambda: (t.ViTForImageClassification(t.ViTConfig(**VISION)), _pixels()),
    "sequential": _sequential,
}

# The other families that methods are tested on.
MORE_FAMILIES: dict[str, Family] = {
    "gemma2": lambda: (t.Gemma2ForCausalLM(t.Gemma2Config(**GQA, head_dim=8)), _ids()),
    "mistral": lambda: (t.MistralForCausalLM(t.MistralConfig(**GQA)), _ids()),
    "mixtral": lambda: (t.MixtralForCausalLM(t.MixtralConfig(**GQA, num_local_experts=4)), _ids()),
    "qwen3_moe": lambda: (
        t.Qwen3MoeForCausalLM(
            t.Qwen3MoeConfig(**GQA, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
        ),
        _ids(),
    ),
    "phi3": lambda: (t.Phi3ForCausalLM(t.Phi3Config(**GQA, **SPECIAL)), _ids()),
    "gpt_neox": lambda: (t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**SMALL)), _ids()),
    "opt": lambda: (
        t.OPTForCausalLM(
            t.OPTConfig(
                **{k: v for k, v in SMALL.items() if k != "intermediate_size"},
                ffn_dim=64,
                word_embed_proj_dim=32,
                max_position_embeddings=64,
            )
        ),
        _ids(),
    ),
    "bloom": lambda: (t.BloomForCausalLM(t.BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4)), _ids()),
    "falcon": lambda: (
        t.FalconForCausalLM(t.FalconConfig(**{k: v for k, v in SMALL.items() if k != "intermediate_size"})),
        _ids(),
    ),
    "roberta": lambda: (t.RobertaForSequenceClassification(t.RobertaConfig(**SMALL)), _ids()),
    "deberta_v2": lambda: (t.DebertaV2ForSequenceClassification(t.DebertaV2Config(**SMALL)), _ids()),
    "distilbert": lambda: (
        t.DistilBertForSequenceClassification(
            t.DistilBertConfig(vocab_size=50, dim=32, hidden_dim=64, n_layers=2, n_heads=4)
        ),
        _ids(),
    ),
    "bart": lambda: (
        t.BartForConditionalGeneration(t.BartConfig(**SEQ2SEQ, max_position_embeddings=64)),
        _both(),
    ),
    "clip": _clip,
    "whisper": lambda: (
        t.WhisperForConditionalGeneration(
            t.WhisperConfig(
                **SEQ2SEQ,
                **SPECIAL,
                num_mel_bins=8,
                max_source_positions=10,
                max_target_positions=16,
                decoder_start_token_id=1,
            )
        ),
        _both(input_features=torch.randn(2, 8, 20)),
    ),
    "torch_encoder": _torch_encoder,
    "torch_decoder": _torch_decoder,
}
ALL_FAMILIES: dict[str, Family] = {**FAMILIES, **MORE_FAMILIES}


@cache
def _built(family: str) -> tuple[nn.Module, dict[str, Any]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, inputs = ALL_FAMILIES[family]()
        for name, parameter in model.named_parameters():
            # transformers starts them at zero, where a bias that got lost would not be seen.
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
    return model.eval(), inputs


def build(family: str) -> tuple[nn.Module, dict[str, Any]]:
    return copy.deepcopy(_built(family))


def outputs(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    result = model(**inputs)
    if isinstance(result, torch.Tensor):
        return result
    return result.logits_per_text if hasattr(result, "logits_per_text") else result.logits


def randomise(model: nn.Module) -> None:
    """Give what is trained values that matter."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)


def strongly(model: nn.Module) -> None:
    """Give what is trained values whose effect no rounding hides."""
    randomise(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.requires_grad else 1)


def fill(model: nn.Module, name: str, seed: int) -> None:
    """Give one adapter the values of ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".peft.{name}." in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
