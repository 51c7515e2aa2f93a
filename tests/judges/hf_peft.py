"""HF PEFT as the judge: what each method is there, and how far from it ours is."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from families import build, outputs
from torch import Tensor, nn

from lightning_peft import (
    BEFT,
    IA3,
    OFT,
    AdaLoRA,
    DoRA,
    LayerNormTuning,
    LoHa,
    LoKr,
    LoRA,
    MiSS,
    NewTokens,
    PEFTMethod,
    PrefixTuning,
    PromptTuning,
    VeRA,
    inject,
    save_adapter,
)
from lightning_peft.core.view import ModelView

DTYPES = {"float64": torch.float64, "float32": torch.float32}
Row = tuple[float, float, float]
"""Largest differences: of logits in float64, of gradients in float64 (relative), of logits in float32 (relative)."""

TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "bert": ["query", "value"],
    "t5": ["q", "wo"],
    "gemma3": [],
    "bart": [],
    "llama with embeddings": ["embed_tokens", "k_proj"],
}
LINEAR = ["llama", "gpt2", "bert", "t5"]
# By name: ours and HF PEFT's configuration, of the modules to adapt, and the families on which they are compared.
Judge = Callable[[list[str]], peft.PeftConfig]
Ours = Callable[[list[str]], PEFTMethod]
METHODS: dict[str, tuple[Ours, Judge, list[str]]] = {
    "dora": (
        lambda targets: DoRA(r=4, alpha=12, target_modules=targets),
        lambda targets: peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets, use_dora=True),
        [*LINEAR, "llama with embeddings"],
    ),
    "vera": (
        lambda targets: VeRA(r=6, target_modules=targets),
        lambda targets: peft.VeraConfig(r=6, target_modules=targets, projection_prng_key=7),
        LINEAR,
    ),
    "vera without its projections": (
        lambda targets: VeRA(r=6, projection_seed=5, target_modules=targets),
        lambda targets: peft.VeraConfig(r=6, target_modules=targets, projection_prng_key=7, save_projection=False),
        ["llama", "gpt2"],
    ),
    "loha": (
        lambda targets: LoHa(r=3, alpha=9, target_modules=targets),
        lambda targets: peft.LoHaConfig(r=3, alpha=9, target_modules=targets),
        ["llama", "bert", "t5"],
    ),
    **{
        f"lokr {options}": (
            lambda targets, options=options: LoKr(target_modules=targets, alpha=9, **options),
            lambda targets, options=options: peft.LoKrConfig(target_modules=targets, alpha=9, **options),
            ["llama", "bert", "t5"],
        )
        # Both factors whole; one or both of low rank; a factor that divides nothing.
        for options in (
            {"r": 4},
            {"r": 2},
            {"r": 1, "decompose_both": True},
            {"r": 2, "decompose_factor": 4},
            {"r": 1, "decompose_factor": 3, "decompose_both": True},
        )
    },
    **{
        f"oft {options}": (
            lambda targets, options=options: OFT(target_modules=targets, **options),
            lambda targets, options=options: peft.OFTConfig(
                target_modules=targets,
                oft_block_size=0 if "r" in options else options["block_size"],
                **{key: value for key, value in options.items() if key != "block_size"},
            ),
            families,
        )
        # A size that divides inputs, and one that does not; a number of blocks; one block for all; exact rotations.
        for options, families in (
            ({"block_size": 8}, ["llama", "bert", "t5"]),
            ({"block_size": 7}, ["llama"]),
            ({"r": 3}, ["llama"]),
            ({"block_size": 4, "block_share": True}, ["llama"]),
            ({"block_size": 8, "use_cayley_neumann": False}, ["llama", "bert"]),
            ({"block_size": 8, "num_cayley_neumann_terms": 8}, ["llama"]),
        )
    },
}
METHODS["miss"] = (
    lambda targets: MiSS(r=5, target_modules=targets),
    lambda targets: peft.MissConfig(r=5, target_modules=targets),
    ["llama", "bert", "t5"],
)
METHODS["miss of fewer columns"] = (
    lambda targets: MiSS(r=4, mini_r=4, target_modules=targets),
    lambda targets: peft.MissConfig(r=4, mini_r=4, init_weights="mini", target_modules=targets),
    ["llama"],
)
METHODS["beft"] = (
    lambda targets: BEFT(target_modules=targets),
    lambda targets: peft.BeftConfig(target_modules=targets),
    ["bert"],  # HF PEFT merges it into biases that are there alone
)
METHODS["adalora"] = (
    lambda targets: AdaLoRA(init_r=5, target_r=3, alpha=12, target_modules=targets),
    lambda targets: peft.AdaLoraConfig(init_r=5, target_r=3, lora_alpha=12, total_step=9, target_modules=targets),
    LINEAR,
)
METHODS["new_tokens"] = (
    lambda targets: NewTokens(token_indices=[7, 3, 49, *range(20, 40)]),
    lambda targets: peft.TrainableTokensConfig(token_indices=[7, 3, 49, *range(20, 40)]),
    ["llama", "gpt2", "bert", "t5", "gemma3", "bart"],
)

VIRTUAL_FAMILIES = ("llama", "gpt2", "qwen2")
VIRTUAL: dict[str, PEFTMethod] = {
    "prefix": PrefixTuning(num_virtual_tokens=4),
    "prompt": PromptTuning(num_virtual_tokens=4),
}

# Target modules and feed-forward modules.
IA3_TARGETS = {
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "qwen2": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "t5": (["k", "v", "wo"], ["wo"]),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "opt": (["k_proj", "v_proj", "fc2"], ["fc2"]),
    "bert": (r".*\.(key|value)|.*layer\.\d\.output\.dense", r".*layer\.\d\.output\.dense"),
    "bloom": (["query_key_value", "mlp.dense_4h_to_h"], ["mlp.dense_4h_to_h"]),
}


def shift(model: nn.Module) -> None:
    """Move what is trained away from its start, without which norms and products of zeros are all the same."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def trained(model: nn.Module) -> list[nn.Parameter]:
    # With another dtype than float32, HF PEFT makes the divisor of AdaLoRA's scale trainable.
    return [p for name, p in model.named_parameters() if p.requires_grad and "ranknum" not in name]


def trainable_judge(family: str, path: Path, model: Any) -> Any:
    """peft's model with the configuration that we wrote, and our values: peft trains no prompt that it loads."""
    config = peft.PeftConfig.from_pretrained(path)
    config.inference_mode = False
    judge: Any = peft.get_peft_model(build(family)[0], config).eval().to(model.dtype)
    ((_, parameter),) = ModelView(model).adapter_parameters.items()
    judge.prompt_encoder["default"].embedding.weight.data.copy_(parameter.detach())
    return judge


def judge_of(model: nn.Module, family: str, path: Path) -> Any:
    """Give HF PEFT's model with our adapters "a", "b" and "c"."""
    judge: Any = None
    for name in "abc":
        save_adapter(model, path / name, name=name)
        if judge is None:
            judge = peft.PeftModel.from_pretrained(build(family)[0], path / name, adapter_name=name)
        else:
            judge.load_adapter(path / name, adapter_name=name)
    return judge.eval()


def of_peft() -> dict[str, list[tuple[str, PEFTMethod]]]:
    """Every method that HF PEFT has, with the families on which the tests compare it."""
    found: dict[str, list[tuple[str, PEFTMethod]]] = {
        "lora": [
            (family, LoRA(r=4, alpha=12, target_modules=targets)) for family, targets in TARGETS.items() if targets
        ],
        "ia3": [(family, IA3()) for family in IA3_TARGETS],
        "layer_norm_tuning": [(family, LayerNormTuning()) for family in ("llama", "gpt2", "bert")],
    }
    for name, (ours, _, families) in METHODS.items():
        found.setdefault(name.split()[0], []).extend((family, ours(TARGETS[family])) for family in families)
    for name, method in VIRTUAL.items():
        found[name] = [(family, method) for family in VIRTUAL_FAMILIES]
    return found


def against_peft(family: str, method: PEFTMethod, dtype: torch.dtype, folder: Path) -> tuple[float, float]:
    """Give the differences of logits and gradients, both relative to the largest one, and to 1 if that is larger."""
    model, inputs = build(family.split()[0])
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    plain = outputs(model.to(dtype), inputs)
    inject(model, method)
    shift(model)
    save_adapter(model, folder)
    ours = outputs(model, inputs)
    assert (ours - plain).abs().max() > 1e-6
    judge = _judge(family.split()[0], model, method, folder).to(dtype)
    theirs = outputs(judge, inputs)[:, -ours.shape[1] :] if ours.dim() == 3 else outputs(judge, inputs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    pairs = list(zip(_gradients(model), _gradients(judge), strict=True))
    assert pairs
    return _relative(ours, theirs), max(_relative(a, b) for a, b in pairs)


def _judge(family: str, model: nn.Module, method: PEFTMethod, folder: Path) -> nn.Module:
    if method in VIRTUAL.values():
        judge: nn.Module = trainable_judge(family, folder, model).to(next(model.parameters()).dtype)
        (ours,), (theirs,) = ([p for p in m.parameters() if p.requires_grad] for m in (model, judge))
        theirs.data.copy_(ours.detach())
        return judge
    base = build(family)[0].to(next(model.parameters()).dtype)
    return peft.PeftModel.from_pretrained(base, folder, is_trainable=True, autocast_adapter_dtype=False).eval()


def _gradients(model: nn.Module) -> list[Tensor]:
    """Values in order of size, of tensors in order of size: judges name and store them in other ways."""
    # HF PEFT makes the divisor of AdaLoRA's scale trainable.
    found = [p.grad for name, p in model.named_parameters() if p.grad is not None and "ranknum" not in name]
    return [g.flatten().sort()[0] for g in sorted(found, key=lambda g: (g.numel(), round(float(g.norm()), 4)))]


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1.0))


def peft_row(name: str) -> Row:
    found: dict[str, list[tuple[float, float]]] = {dtype: [] for dtype in DTYPES}
    for family, method in of_peft()[name]:
        for dtype in DTYPES:
            with tempfile.TemporaryDirectory() as folder:
                found[dtype].append(against_peft(family, method, DTYPES[dtype], Path(folder) / "adapter"))
    wide, narrow = found["float64"], found["float32"]
    return max(row[0] for row in wide), max(row[1] for row in wide), max(row[0] for row in narrow)
