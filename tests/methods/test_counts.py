"""Trainable parameters, counted on models of the papers' sizes that hold no memory, against the papers' figures."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import transformers as t
from torch import nn

from lightning_peft import (
    BEFT,
    OFT,
    AdaLoRA,
    BitFit,
    FullFinetuning,
    LoKr,
    LoRA,
    LoReFT,
    MiSS,
    ParallelAdapter,
    PEFTMethod,
    PrefixTuning,
    PromptTuning,
    SeriesAdapter,
    eject,
    inject,
)

# GPT-2's query, key and value projections are one layer: rows that adapt some of them stand on OPT, which has the same
# widths and depth, and separate ones.
MODELS: dict[str, Any] = {
    "GPT-3": lambda: t.GPT2LMHeadModel(t.GPT2Config(n_embd=12288, n_layer=96, n_head=96, n_positions=2048)),
    "GPT-3, head untied": lambda: t.GPT2LMHeadModel(
        t.GPT2Config(n_embd=12288, n_layer=96, n_head=96, n_positions=2048, tie_word_embeddings=False)
    ),
    "GPT-3 as OPT": lambda: opt(96, 12288),
    "GPT-2 M": lambda: t.GPT2LMHeadModel(t.GPT2Config(n_embd=1024, n_layer=24, n_head=16)),
    "GPT-2 M as OPT": lambda: opt(24, 1024),
    "GPT-2 L as OPT": lambda: opt(36, 1280),
    "RoBERTa-base": lambda: roberta(12, 768),
    "RoBERTa-large": lambda: roberta(24, 1024),
    "DeBERTa-XXL": lambda: t.DebertaV2Model(
        t.DebertaV2Config(hidden_size=1536, num_hidden_layers=48, num_attention_heads=24, intermediate_size=6144)
    ),
    "LLaMA-7B": lambda: t.LlamaForCausalLM(
        t.LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    ),
    "MiniLM": lambda: t.BertModel(
        t.BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12),
        add_pooling_layer=False,
    ),
}


def opt(layers: int, d: int) -> nn.Module:
    config = t.OPTConfig(
        hidden_size=d,
        word_embed_proj_dim=d,
        ffn_dim=4 * d,
        num_hidden_layers=layers,
        num_attention_heads=d // 64,
        vocab_size=50257,
    )
    return t.OPTForCausalLM(config)


def roberta(layers: int, d: int) -> nn.Module:
    config = t.RobertaConfig(
        hidden_size=d, intermediate_size=4 * d, num_hidden_layers=layers, num_attention_heads=d // 64
    )
    return t.RobertaModel(config, add_pooling_layer=False)


@dataclass(frozen=True)
class Row:
    """A row of a paper's table."""

    model: str
    method: PEFTMethod | list[PEFTMethod]
    count: int
    paper: float | None = None
    """The figure in the paper, in millions, to its printed digits."""
    why: str = ""
    """Why the paper's figure is another."""


def lora(r: int, *projections: str) -> LoRA:
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
    return LoRA(r=r, target_modules=[names.get(p, p) for p in projections])


def houlsby(m: int, norms: bool = False) -> SeriesAdapter:
    return SeriesAdapter(bottleneck=m, train_norms=norms)


def llm(*places: Any) -> SeriesAdapter:
    return SeriesAdapter(preset="llm_adapters", bottleneck=256, placement=list(places))


def virtual(prefix: int, infix: int, every_layer: bool = False) -> PromptTuning:
    return PromptTuning(num_virtual_tokens=prefix, num_infix_tokens=infix, every_layer=every_layer)


GPT3, OPT = "GPT-3", "GPT-3 as OPT"
# The LoRA paper's figures of PreLayer are not those of its formula, L · d · (l_p + l_i), by 0.4 to 1.6 M.
PRE_LAYER = "L d (l_p + l_i) by the paper's own formula is less"
# LoRA, arXiv:2106.09685, tables 2 (RoBERTa, DeBERTa), 3 (GPT-2), 4 and 15 (GPT-3: the figures of LoRA are cut off, not
# rounded, after one decimal); LLM-Adapters, arXiv:2304.01933, its README (LLaMA-7B); OFTv2,
# arXiv:2506.19847, and MiSS, arXiv:2409.15371, of Llama-2-7B. Rows without a figure are sums by
# the formulas of this package's README for settings that these papers' code uses.
ROWS = [
    Row(GPT3, FullFinetuning(), 174_604_259_328, 175_255.8, "its own count; embeddings tied, 2048 positions here"),
    Row("GPT-3, head untied", FullFinetuning(), 175_221_817_344, 175_255.8, "its own count; the nearest there is"),
    Row(
        GPT3, BitFit(), 12_988_416, 14.2, "every bias: 11 d a layer and the last norm's d; 12 d a layer would be 14.16"
    ),
    Row(GPT3, houlsby(1), 7_078_080, 7.1),
    Row(GPT3, houlsby(4), 21_234_432, 21.2),
    Row(GPT3, houlsby(8), 40_109_568, 40.1),
    Row(GPT3, houlsby(16), 77_859_840, 77.9),
    Row(GPT3, houlsby(64), 304_361_472, 304.4),
    Row(OPT, lora(2, "v"), 4_718_592, 4.7),
    Row(OPT, lora(1, "q", "v"), 4_718_592, 4.7),
    Row(OPT, lora(2, "q", "v"), 9_437_184, 9.4),
    Row(OPT, lora(1, "q", "k", "v", "o"), 9_437_184, 9.4),
    Row(OPT, lora(4, "q", "v"), 18_874_368, 18.8),
    Row(OPT, lora(2, "q", "k", "v", "o"), 18_874_368, 18.8),
    Row(OPT, lora(8, "q", "v"), 37_748_736, 37.7),
    Row(OPT, lora(4, "q", "k", "v", "o"), 37_748_736, 37.7),
    Row(OPT, lora(64, "q", "v"), 301_989_888, 301.9),
    Row(OPT, lora(64, "q", "k", "v", "o"), 603_979_776, 603.8, "twice the 301.9 that were cut off"),
    Row(GPT3, virtual(32, 8), 491_520, 0.4),
    Row(GPT3, virtual(64, 8), 884_736, 0.9),
    Row(GPT3, virtual(128, 8), 1_671_168, 1.7),
    Row(GPT3, virtual(256, 8), 3_244_032, 3.2),
    Row(GPT3, virtual(512, 8), 6_389_760, 6.4),
    Row(GPT3, virtual(2, 2, True), 4_718_592, 5.1, PRE_LAYER),
    Row(GPT3, virtual(8, 0, True), 9_437_184, 10.1, PRE_LAYER),
    Row(GPT3, virtual(8, 8, True), 18_874_368, 20.2, PRE_LAYER),
    Row(GPT3, virtual(32, 4, True), 42_467_328, 44.1, PRE_LAYER),
    Row(GPT3, virtual(64, 0, True), 75_497_472, 76.1, PRE_LAYER),
    Row(OPT, [lora(8, "q", "v"), virtual(8, 4)], 37_896_192, 37.8),
    Row(OPT, [lora(32, "q", "v"), virtual(8, 4)], 151_142_400, 151.1),
    Row(OPT, [lora(64, "q", "v"), virtual(8, 4)], 302_137_344, 302.1),
    Row(OPT, [lora(8, "q", "v"), virtual(8, 4, True)], 51_904_512, 52.8, PRE_LAYER),
    Row("GPT-2 M as OPT", lora(4, "q", "v"), 393_216, 0.35, "r=4 by the paper's table 11; no r gives it"),
    Row("GPT-2 L as OPT", lora(4, "q", "v"), 737_280, 0.77, "r=4 by the paper's table 11; no r gives it"),
    Row("GPT-2 M", houlsby(112), 11_064_576, 11.09, "its bottleneck is not given; 112 comes near"),
    Row("RoBERTa-base", LoRA(r=8, target_modules=["query", "value"]), 294_912, 0.3),
    Row("RoBERTa-large", LoRA(r=8, target_modules=["query", "value"]), 786_432, 0.8),
    Row("RoBERTa-large", houlsby(8), 835_968, 0.8),
    Row(
        "RoBERTa-large",
        houlsby(64, norms=True),
        6_441_984,
        6.0,
        "rounded there; the norms in the layers are trained too",
    ),
    Row("RoBERTa-large", SeriesAdapter(preset="pfeiffer", bottleneck=16), 811_392, 0.8),
    Row("RoBERTa-large", SeriesAdapter(preset="pfeiffer", bottleneck=64), 3_171_840, 3.0, "rounded there"),
    Row("DeBERTa-XXL", LoRA(r=8, target_modules=["query_proj", "value_proj"]), 2_359_296, 4.7, "the code has r=16"),
    Row("LLaMA-7B", lora(8, "q", "v"), 4_194_304, 4.2),
    Row("LLaMA-7B", lora(32, "q", "k", "v", "up_proj", "down_proj"), 56_098_816),
    Row("LLaMA-7B", llm("mlp_input", "mlp"), 201_326_592, 200, "rounded to hundreds there"),
    Row("LLaMA-7B", llm("mlp"), 67_108_864),
    Row("LLaMA-7B", llm("mlp_input"), 134_217_728),
    Row(
        "LLaMA-7B",
        ParallelAdapter(target_modules=["up_proj", "down_proj"], bottleneck=256, bias=False),
        247_463_936,
    ),
    Row("LLaMA-7B", PrefixTuning(num_virtual_tokens=10), 2_621_440),
    Row("LLaMA-7B", LoKr(r=8, target_modules=["q_proj", "v_proj"]), 327_680),
    # 0.031 % of 6.74 billion.
    Row("LLaMA-7B", LoReFT(r=8), 2_097_408, 2.09),
    Row("LLaMA-7B", MiSS(r=64), 87_031_808, 87.0),
    Row("LLaMA-7B", BEFT(), 131_072),
    Row("MiniLM", BEFT(target_modules="all-linear"), 20_736),
    Row("LLaMA-7B", OFT(block_size=32), 17_649_664, 17.65),
    Row("LLaMA-7B", AdaLoRA(init_r=12, target_modules=["q_proj", "v_proj"]), 6_292_224),
    Row("MiniLM", LoRA(r=8, target_modules=["query", "value"]), 73_728),
    Row("MiniLM", houlsby(16, norms=True), 161_472),
    Row("MiniLM", BitFit(), 25_728),
]


@cache
def on_meta(model: str) -> nn.Module:
    with torch.device("meta"):
        made: nn.Module = MODELS[model]()
    return made


def label(row: Row) -> str:
    methods = row.method if isinstance(row.method, list) else [row.method]
    return f"{row.model} {'+'.join(type(method).__name__ for method in methods)} {row.count}"


@pytest.mark.parametrize("row", ROWS, ids=label)
def test_counts(row: Row) -> None:
    model = on_meta(row.model)
    inject(model, row.method)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    eject(model)
    assert count == row.count
    if row.paper is not None:
        # Some figures are rounded, some cut off.
        digits = len(str(row.paper).partition(".")[2]) if isinstance(row.paper, float) else 0
        reproduced = abs(count / 1e6 - row.paper) < 10.0**-digits
        assert reproduced == (not row.why), "what does not reproduce has a reason, and nothing else has"
