"""AdapterHub's package as the judge of bottleneck and Compacter adapters, through what it computed once.

``adapterhub_fixtures.py`` wrote that, with weights for models of the same architectures. Three of the package's
defaults are not the papers', and the fixtures have the papers' (the package has options for that):

- Compacter++ stands where the adapter of Compacter after the MLP does, before the residual connection: so it is in its
  authors' code (``T5LayerFF``). The package gives it Pfeiffer's placement.
- Adapters after attention are after cross-attention too: a sublayer like the others (Houlsby et al., section 2.1).
- A parallel adapter reads what the MLP reads. In models that normalise before a block that is the normalised hidden
  state, as by default in the code of its authors (``hi_lnbefore=0``). The package reads it before the norm, without an
  option: so it judges parallel adapters on BERT alone, which normalises after a block.
"""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch
import transformers as t
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_peft import Compacter, ParallelAdapter, PEFTMethod, SeriesAdapter, inject

SMALL = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 11}
T5 = {"d_model": 16, "d_ff": 20, "num_layers": 1, "num_heads": 2, "d_kv": 8, "vocab_size": 11}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 20, "vocab_size": 11, "n_positions": 8}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**SMALL, max_position_embeddings=8)),
    "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**GPT2)),
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SMALL, num_key_value_heads=1)),
    "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(**T5, decoder_start_token_id=0)),
}
METHODS: dict[str, PEFTMethod] = {
    "houlsby": SeriesAdapter(bottleneck=4, activation="swish", scale=0.5),
    "pfeiffer": SeriesAdapter(bottleneck=4, preset="pfeiffer"),
    "parallel": ParallelAdapter(bottleneck=4),
    "compacter": Compacter(bottleneck=8),
    "compacter++": Compacter(bottleneck=8, placement=["mlp"]),
}
CASES = [(f, case) for case in METHODS for f in MODELS if case != "parallel" or f == "bert"]

# Where the package has its adapters, with the module that is the host of ours.
PLACES: dict[str, dict[str, str]] = {
    "bert": {
        f"bert.encoder.layer.{i}.{place}": f"bert.encoder.layer.{i}.{place}.dense"
        for i in (0, 1)
        for place in ("attention.output", "output")
    },
    "gpt2": {
        f"transformer.h.{i}.{theirs}": f"transformer.h.{i}.{ours}"
        for i in (0, 1)
        for theirs, ours in (("attention_adapters", "attn.c_proj"), ("output_adapters", "mlp.c_proj"))
    },
    "llama": {
        f"model.layers.{i}.{theirs}": f"model.layers.{i}.{ours}"
        for i in (0, 1)
        for theirs, ours in (("attention_adapters", "self_attn.o_proj"), ("output_adapters", "mlp.down_proj"))
    },
    "t5": {
        "encoder.block.0.layer.0": "encoder.block.0.layer.0.SelfAttention.o",
        "encoder.block.0.layer.1": "encoder.block.0.layer.1.DenseReluDense.wo",
        "decoder.block.0.layer.0": "decoder.block.0.layer.0.SelfAttention.o",
        "decoder.block.0.layer.1": "decoder.block.0.layer.1.EncDecAttention.o",
        "decoder.block.0.layer.2": "decoder.block.0.layer.2.DenseReluDense.wo",
    },
}
LAYERS: dict[str, dict[str, str]] = {
    "bert": {f"bert.encoder.layer.{i}.output": f"bert.encoder.layer.{i}" for i in (0, 1)},
    "gpt2": {f"transformer.h.{i}.output_adapters": f"transformer.h.{i}" for i in (0, 1)},
    "llama": {f"model.layers.{i}.output_adapters": f"model.layers.{i}" for i in (0, 1)},
    "t5": {"encoder.block.0.layer.1": "encoder.block.0", "decoder.block.0.layer.2": "decoder.block.0"},
}
# Its name of a parameter, ours, and the way from its layout to ours: its matrices are those of x W, ours those of W x.
PARAMETERS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "adapter_down.0.weight": ("down", lambda w: w),
    "adapter_down.0.bias": ("down_bias", lambda b: b),
    "adapter_up.weight": ("up", lambda w: w),
    "adapter_up.bias": ("up_bias", lambda b: b),
    "adapter_down.0.W_left": ("down_t", lambda w: w[..., 0]),
    "adapter_down.0.W_right": ("down_s", lambda w: w[:, 0]),
    "adapter_down.0.b": ("down_bias", lambda b: b),
    "adapter_up.W_left": ("up_t", lambda w: w[..., 0]),
    "adapter_up.W_right": ("up_s", lambda w: w[:, 0]),
    "adapter_up.b": ("up_bias", lambda b: b),
}


@cache
def stored() -> dict[str, Tensor]:
    return load_file(Path(__file__).parent / "data" / "adapterhub.safetensors")


def under(prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): v for name, v in stored().items() if name.startswith(prefix)}


def translated(family: str, case: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The package's tensors by our names and in our layout; those of base parameters as they are."""
    places = (LAYERS if case == "pfeiffer" else PLACES)[family]
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        place, adapter, parameter = name.partition(".adapters.a.")
        if adapter:
            ours, layout = PARAMETERS[parameter]
            found[f"{places[place]}.peft.default.{ours}"] = layout(tensor)
        elif name.endswith("phm_rule"):
            # Every adapter holds it; it has the name of the first one.
            first = next(host for host in places.values() if case == "compacter" or not _is_attention(host))
            found[f"{first}.peft.default.slow.phm_A"] = tensor.mT
        else:
            found[name] = tensor
    return found


def _is_attention(host: str) -> bool:
    return any(part in host for part in ("attn", "attention", "Attention"))


def base(family: str) -> nn.Module:
    model, weights = MODELS[family]().double(), under(f"{family}/base/")
    assert weights.keys() == dict(model.named_parameters()).keys()
    model.load_state_dict(weights, strict=False)
    return model.eval()


def compute(family: str, case: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, dict[str, Tensor]]:
    """Our logits and gradients, with the package's adapters."""
    model = base(family)
    inject(model, METHODS[case])
    weights = translated(family, case, under(f"{family}/{case}/adapter/"))
    parameters = dict(model.named_parameters())
    assert weights.keys() == {name for name in parameters if ".peft." in name}
    with torch.no_grad():
        for name, tensor in weights.items():
            parameters[name].copy_(tensor)
    logits = model.to(dtype)(**under(f"{family}/input/")).logits
    logits.square().sum().backward()
    return logits.detach(), {name: p.grad for name, p in parameters.items() if p.grad is not None}


def differences(family: str, case: str) -> dict[str, float]:
    """Largest differences from the package: of logits, and of gradients relative to the largest one (at least 1)."""
    expected = translated(family, case, under(f"{family}/{case}/gradient/"))
    (logits, gradients), (single, _) = (compute(family, case, dtype) for dtype in (torch.float64, torch.float32))
    assert {name for name in expected if ".peft." in name} <= gradients.keys() <= expected.keys()
    reference = stored()[f"{family}/{case}/logits"]
    scale = max(float(g.abs().max()) for g in expected.values())
    return {
        "logits": float((logits - reference).abs().max()),
        "gradients": max(float((g - expected[n]).abs().max()) for n, g in gradients.items()) / max(scale, 1.0),
        "float32": float((single.double() - reference).abs().max()),
    }
