"""Configurations of HF PEFT, by family and name, for the exchange of files in both directions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
from torch import nn

# What is adapted, what embeds tokens, what is trained whole.
NAMES: dict[str, tuple[list[str], str, str]] = {
    "llama": (["q_proj", "down_proj"], "embed_tokens", "lm_head"),
    "gpt2": (["c_attn", "c_fc"], "wte", "score"),
    "bert": (["value", "dense"], "word_embeddings", "classifier"),
    "t5": (["q", "wo"], "shared", "lm_head"),
    "gemma3": (["q_proj", "gate_proj"], "embed_tokens", "lm_head"),
    "qwen2": (["q_proj", "v_proj"], "embed_tokens", "lm_head"),
    "vit": (["q_proj", "v_proj"], "", "classifier"),
    "whisper": (["q_proj", "fc1"], "embed_tokens", "proj_out"),
    "mixtral": (["q_proj", "v_proj"], "embed_tokens", "lm_head"),
}
TASKS = {"bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM", "vit": None, "whisper": None}

LORA: dict[str, Callable[[list[str], str, str], dict[str, Any]]] = {
    "plain": lambda targets, embedding, head: {},
    "bias all": lambda targets, embedding, head: {"bias": "all"},
    "bias lora_only": lambda targets, embedding, head: {"bias": "lora_only"},
    "lora_bias": lambda targets, embedding, head: {"lora_bias": True},
    "embedding": lambda targets, embedding, head: {"target_modules": [*targets, embedding]},
    "head": lambda targets, embedding, head: {"target_modules": [*targets, head]},
    "whole head": lambda targets, embedding, head: {"modules_to_save": [head]},
    "whole embedding": lambda targets, embedding, head: {"modules_to_save": [embedding]},
    "tokens": lambda targets, embedding, head: {"trainable_token_indices": [9, 17, 22, 33]},
    "layers": lambda targets, embedding, head: {"layers_to_transform": [1]},
    "all-linear": lambda targets, embedding, head: {"target_modules": "all-linear"},
    "expression": lambda targets, embedding, head: {"target_modules": f".*({'|'.join(targets)})"},
    "pissa": lambda targets, embedding, head: {"init_lora_weights": "pissa"},
    "olora": lambda targets, embedding, head: {"init_lora_weights": "olora"},
    "alora": lambda targets, embedding, head: {"alora_invocation_tokens": [22], "task_type": "CAUSAL_LM"},
    "dora": lambda targets, embedding, head: {"use_dora": True},
    "patterns": lambda targets, embedding, head: {
        "use_rslora": True, "rank_pattern": {targets[0]: 3}, "alpha_pattern": {targets[1]: 5},
    },
}  # fmt: skip


def _ia3(targets: list[str]) -> peft.PeftConfig:
    return peft.IA3Config(target_modules=targets, feedforward_modules=targets[1:])


OTHERS: dict[str, Callable[[list[str]], peft.PeftConfig]] = {
    "adalora": lambda targets: peft.AdaLoraConfig(init_r=3, target_r=2, target_modules=targets, total_step=10),
    "ia3": _ia3,
    "loha": lambda targets: peft.LoHaConfig(r=2, target_modules=targets),
    "lokr": lambda targets: peft.LoKrConfig(r=2, target_modules=targets),
    "vera": lambda targets: peft.VeraConfig(r=2, target_modules=targets[:1]),
    "oft": lambda targets: peft.OFTConfig(r=0, oft_block_size=4, target_modules=targets),
    "miss": lambda targets: peft.MissConfig(r=3, target_modules=targets),
    "beft": lambda targets: peft.BeftConfig(target_modules=targets),
    "boft": lambda targets: peft.BOFTConfig(boft_block_size=4, target_modules=targets),
    "hra": lambda targets: peft.HRAConfig(r=2, target_modules=targets),
    "norms": lambda targets: peft.LNTuningConfig(),
    "rows": lambda targets: peft.TrainableTokensConfig(token_indices=[9, 17, 22, 33]),
}
PROMPTS: dict[str, Callable[[str | None], peft.PeftConfig]] = {
    "prompt": lambda task: peft.PromptTuningConfig(num_virtual_tokens=3, task_type=task),
    "prefix": lambda task: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type=task),
    "p-tuning": lambda task: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, task_type=task),
}
CASES = [
    (family, name)
    for family in NAMES
    for name in (*LORA, *OTHERS, *PROMPTS)
    if name != "alora" or family in ("llama", "gemma3", "qwen2", "mixtral")
]


def adapted(model: nn.Module, family: str, name: str) -> peft.PeftModel:
    """Return ``model`` as HF PEFT adapts it by this configuration."""
    targets, embedding, head = NAMES[family]
    if name in LORA:
        keys = {"r": 2, "lora_alpha": 3, "target_modules": targets, **LORA[name](targets, embedding, head)}
        return peft.get_peft_model(model, peft.LoraConfig(**keys))
    config = OTHERS[name](targets) if name in OTHERS else PROMPTS[name](TASKS.get(family, "CAUSAL_LM"))
    return peft.get_peft_model(model, config)
