"""What the fields of HF PEFT's configurations are called here. A field that no table has is refused unless it is unset.

The names are those of HF PEFT 0.21.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_peft.core.method import PEFTMethod
from lightning_peft.methods.adalora import AdaLoRA
from lightning_peft.methods.beft import BEFT
from lightning_peft.methods.dora import DoRA
from lightning_peft.methods.ia3 import IA3
from lightning_peft.methods.layer_norm_tuning import LayerNormTuning
from lightning_peft.methods.loha import LoHa
from lightning_peft.methods.lokr import LoKr
from lightning_peft.methods.lora import LoRA
from lightning_peft.methods.miss import MiSS
from lightning_peft.methods.new_tokens import NewTokens
from lightning_peft.methods.oft import OFT
from lightning_peft.methods.prefix_tuning import PrefixTuning
from lightning_peft.methods.prompt_tuning import PromptTuning
from lightning_peft.methods.vera import VeRA


@dataclass(frozen=True)
class Fields:
    """How one of HF PEFT's configurations is read."""

    method: type[PEFTMethod]
    same: tuple[str, ...] = ()
    """Fields that have the same name and meaning here."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Fields that have another name here, with that name."""
    without_effect: frozenset[str] = frozenset()
    """Fields that change nothing, beside :data:`WITHOUT_EFFECT`."""


WITHOUT_EFFECT = frozenset(
    {
        *("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        # Seen by the layer; of interest only beside a field that is refused; what HF PEFT itself passes over.
        *("fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
    }
)
"""Fields of every configuration that say nothing of what is trained."""

READ_BY_HAND = frozenset(
    {
        *("target_modules", "exclude_modules", "feedforward_modules", "layers_to_transform", "target_parameters"),
        *("rank_pattern", "alpha_pattern", "modules_to_save", "task_type"),
        *("bias", "trainable_token_indices", "use_dora", "init_lora_weights"),
        *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path"),
    }
)
"""Fields whose values are said in other words here."""

_LORA = {"lora_alpha": "alpha", "lora_dropout": "dropout"}
_LORA_SAME = ("r", "use_rslora")

FIELDS: Mapping[str, Fields] = {
    "LORA": Fields(LoRA, (*_LORA_SAME, "lora_bias", "alora_invocation_tokens"), _LORA),
    "DORA": Fields(DoRA, _LORA_SAME, _LORA),
    "ADALORA": Fields(
        AdaLoRA,
        ("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight"),
        _LORA,
        # The rank is `init_r`, and the number of steps the run's own.
        frozenset({"r", "total_step"}),
    ),
    "IA3": Fields(IA3),
    "LOHA": Fields(LoHa, ("r", "alpha", "use_effective_conv2d")),
    "LOKR": Fields(LoKr, ("r", "alpha", "decompose_both", "decompose_factor", "use_effective_conv2d")),
    # The projections are always saved.
    "VERA": Fields(
        VeRA,
        ("r", "d_initial"),
        {"vera_dropout": "dropout", "projection_prng_key": "projection_seed"},
        frozenset({"save_projection"}),
    ),
    "OFT": Fields(
        OFT,
        ("r", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms"),
        {"oft_block_size": "block_size"},
        # HF PEFT itself drops no blocks; the other is of interest only beside a field that is refused.
        frozenset({"module_dropout", "eps"}),
    ),
    # Whether there are fewer columns, and their number, are read by hand.
    "MISS": Fields(MiSS, ("r",), {"miss_dropout": "dropout"}, frozenset({"init_weights", "mini_r"})),
    "BEFT": Fields(BEFT),
    "LN_TUNING": Fields(LayerNormTuning),
    "TRAINABLE_TOKENS": Fields(NewTokens, ("token_indices",)),
    "PREFIX_TUNING": Fields(PrefixTuning, ("num_virtual_tokens", "prefix_projection", "encoder_hidden_size")),
    "PROMPT_TUNING": Fields(PromptTuning, ("num_virtual_tokens",)),
}
"""By HF PEFT's name of the method; DoRA, which it has as a switch of LoRA, by its own."""


def plain(value: Any) -> Any:
    """Return a value without its enum, and a set as a list in order."""
    value = getattr(value, "value", value)
    return sorted(value) if isinstance(value, set | frozenset) else value
