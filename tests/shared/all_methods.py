"""Every registered method with the settings in which it is tested, and the families on which it makes no sense."""

from lightning_peft import (
    BitFit,
    LoRA,
    LoReFT,
    NewTokens,
    ParallelAdapter,
    PEFTMethod,
    PrefixTuning,
    PromptTuning,
    SeriesAdapter,
)
from lightning_peft.core.method import registered_methods

OURS = {n: cls for n, cls in registered_methods().items() if cls.__module__.startswith("lightning_peft.methods.")}

# Every method with its defaults, and variants that behave differently enough to go through all of it.
METHODS: dict[str, PEFTMethod | list[PEFTMethod]] = {
    **{name: cls() for name, cls in OURS.items()},
    "new_tokens": NewTokens(token_indices=list(range(3, 50))),
    "lora with frozen A": LoRA(r=4, freeze_A=True),
    "lora from the weight": LoRA(r=4, init="pissa"),
    "bitfit with new biases": BitFit(create_missing=True),
    "series_adapter of pfeiffer": SeriesAdapter(preset="pfeiffer", bottleneck=4),
    "series_adapter before the mlp": SeriesAdapter(preset="llm_adapters", placement=["mlp_input"], bottleneck=4),
    "parallel_adapter everywhere": ParallelAdapter(placement=["attention", "mlp"], bottleneck=4),
    "prefix_tuning with an mlp": PrefixTuning(prefix_projection=True, encoder_hidden_size=12),
    "prompt_tuning with infix tokens": PromptTuning(num_virtual_tokens=8, num_infix_tokens=4),
    "loreft at both ends": LoReFT(r=2, prefix_positions=1, suffix_positions=2),
    "prompt_tuning in every layer": PromptTuning(num_virtual_tokens=8, num_infix_tokens=4, every_layer=True),
    "prefix_tuning and parallel_adapter": [PrefixTuning(), ParallelAdapter(bottleneck=4)],
    "bitfit and parallel_adapter": [BitFit(create_missing=True), ParallelAdapter(bottleneck=4)],
}

# The family on which a method is tested that is tested on one alone: on "opt", or on this one.
FAMILY = {"bitfit": "gpt2"}

MIXTURES = ("mixtral", "qwen3_moe")
NO_BIAS = ("llama", "qwen3", "gemma2", "gemma3", "mistral", "phi3", "t5", *MIXTURES)
NO_BIAS_IN_MLP = ("qwen2", "falcon", *(family for family in NO_BIAS if family not in MIXTURES))
BLOCKS = [name for name in METHODS if name.startswith(("series", "parallel", "ia3", "compacter"))] + [
    "bitfit and parallel_adapter"
]
DECODER_ONLY = [name for name in METHODS if name.startswith(("prefix_tuning", "prompt_tuning", "loreft"))]
ENCODERS = ("bert", "roberta", "deberta_v2", "distilbert", "vit", "clip", "torch_encoder")
NO_DECODER = ("sequential", *ENCODERS, "t5", "bart", "whisper", "torch_decoder")
# Cells that make no sense, with the reason that the error gives.
REFUSED: dict[tuple[str, str], str] = {
    **{("bitfit", family): "has no biases" for family in NO_BIAS},
    **{(method, "sequential"): "No (attention|mlp) block was found" for method in BLOCKS},
    ("beft", "sequential"): "No attention block was found",
    **{("beft", family): "has no value projection" for family in ("torch_encoder", "torch_decoder")},
    ("layer_norm_tuning", "sequential"): "has no LayerNorm",
    # The experts' 3-D parameters belong to no linear layer.
    **{("ia3", family): "'model.layers.0.mlp'.*no linear layers" for family in MIXTURES},
    # nn.MultiheadAttention has one parameter for all projections, and never calls its output projection.
    **{("ia3", family): "MultiheadAttention.*no linear layers" for family in ("torch_encoder", "torch_decoder")},
    # Both would hang on the MLP's linear layers, which have no biases.
    **{("bitfit and parallel_adapter", family): "BitFit and ParallelAdapter would both" for family in NO_BIAS_IN_MLP},
    **{
        ("new_tokens", family): "no input embedding that is known"
        for family in ("sequential", "vit", "clip", "torch_encoder", "torch_decoder")
    },
    **{(method, family): "decoder-only transformers models" for method in DECODER_ONLY for family in NO_DECODER},
}
