"""HF PEFT's configuration objects as methods: what HF PEFT would adapt and train, with its outputs, and no more."""

from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
from families import build, outputs
from judges.hf_peft import shift
from safetensors import safe_open
from torch import nn

from lightning_peft import (
    IA3,
    BitFit,
    DoRA,
    LoRA,
    NewTokens,
    PEFTError,
    PEFTStrategy,
    PromptTuning,
    from_peft_config,
    inject,
    load_adapter,
    save_adapter,
)

QV = ["q_proj", "v_proj"]
# Configurations, and the families that they are for.
CONFIGS: dict[str, tuple[str, peft.PeftConfig]] = {
    "names": ("llama", peft.LoraConfig(r=3, lora_alpha=5, target_modules=QV)),
    "a regular expression": ("llama", peft.LoraConfig(target_modules=r"model\.layers\.1\..*\.(q|up)_proj")),
    "all-linear": ("llama", peft.LoraConfig(target_modules="all-linear", use_rslora=True)),
    "exclude": ("llama", peft.LoraConfig(target_modules=QV, exclude_modules=r".*layers\.1.*v_proj")),
    "layers": ("llama", peft.LoraConfig(target_modules=QV, layers_to_transform=1)),
    "patterns": (
        "llama",
        peft.LoraConfig(
            target_modules=[*QV, "down_proj"],
            rank_pattern={"down_proj": 2, r"layers\.0\..*v_proj": 5},
            alpha_pattern={r"0.*q_proj": 3},
        ),
    ),
    "the first pattern that matches": (
        "llama",
        peft.LoraConfig(
            target_modules=QV,
            rank_pattern={".*_proj": 3, "model.layers.0.self_attn.q_proj": 2},
            alpha_pattern={"v_proj": 5, "model.layers.0.self_attn.v_proj": 2, ".*proj": 7},
        ),
    ),
    "an expression that looks ahead": ("llama", peft.LoraConfig(target_modules=r"(?!model\.layers\.0).*q_proj")),
    "the preset in other letters": ("llama", peft.LoraConfig(target_modules="All-Linear")),
    "DoRA": ("llama", peft.LoraConfig(r=2, target_modules=QV, use_dora=True)),
    "a bias of B": ("gpt2", peft.LoraConfig(r=2, target_modules=["c_attn"], lora_bias=True, fan_in_fan_out=True)),
    "biases": ("bert", peft.LoraConfig(r=2, target_modules=["query"], bias="lora_only")),
    "all biases": ("bert", peft.LoraConfig(r=2, target_modules=["query"], bias="all")),
    "tokens": ("llama", peft.LoraConfig(r=2, target_modules=QV, trainable_token_indices=[4, 2])),
    "tokens by name": ("gpt2", peft.LoraConfig(target_modules=["c_attn"], trainable_token_indices={"wpe": [3, 1]})),
    "modules": ("llama", peft.LoraConfig(r=2, target_modules=QV, modules_to_save=["lm_head"])),
    "modules by the end of a word": ("llama", peft.LoraConfig(r=2, target_modules=QV, modules_to_save=["norm"])),
    "a head by its task": ("bert", peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")),
    "experts": ("mixtral", peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"])),
    "IA3": ("llama", peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "IA3 by expressions": (
        "bert",
        peft.IA3Config(
            target_modules=r".*\.key|.*layer\.\d\.output\.dense", feedforward_modules=r".*layer\.\d\.output\.dense"
        ),
    ),
    "LoHa": ("llama", peft.LoHaConfig(r=2, alpha=3, target_modules=QV)),
    "LoKr": ("llama", peft.LoKrConfig(r=2, alpha=3, decompose_factor=4, target_modules=QV)),
    "VeRA": ("llama", peft.VeraConfig(r=6, target_modules=QV, projection_prng_key=7, d_initial=0.3)),
    "OFT": ("llama", peft.OFTConfig(oft_block_size=4, block_share=True, target_modules=QV)),
    "OFT by number": ("llama", peft.OFTConfig(r=3, oft_block_size=0, use_cayley_neumann=False, target_modules=QV)),
    "MiSS": ("llama", peft.MissConfig(r=4, target_modules=QV)),
    "MiSS of fewer columns": ("llama", peft.MissConfig(r=4, mini_r=2, init_weights="mini", target_modules=QV)),
    "BEFT": ("bert", peft.BeftConfig(target_modules=["value"])),
    "BEFT by itself": ("bert", peft.BeftConfig()),
    "AdaLoRA": ("llama", peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=3, total_step=9, target_modules=QV)),
    "norms": ("llama", peft.LNTuningConfig(target_modules=["input_layernorm"])),
    "rows": ("llama", peft.TrainableTokensConfig(token_indices=[4, 2], target_modules=["embed_tokens"])),
    "a prefix": ("llama", peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
    "a prompt": ("llama", peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
}


def shapes(folder: Path) -> dict[str, list[int]]:
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no mapping)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_hf_peft_makes_of_it(name: str, tmp_path: Path) -> None:
    family, config = CONFIGS[name]
    model, inputs = build(family)
    methods, train_also = from_peft_config(config)
    inject(model, methods, train_also=train_also)
    save_adapter(model, tmp_path / "ours")
    judge = peft.get_peft_model(build(family)[0], config).eval()
    shift(judge)
    judge.save_pretrained(tmp_path / "theirs")
    theirs = {name: shape for name, shape in shapes(tmp_path / "theirs").items() if "original_module" not in name}
    assert shapes(tmp_path / "ours") == theirs
    load_adapter(model, tmp_path / "theirs")  # into the adapters that are there: another method is refused
    found, expected = outputs(model, inputs), outputs(judge, inputs)
    expected = expected[:, -found.shape[1] :]  # HF PEFT gives the logits of virtual tokens as well
    assert (found - expected).abs().max() <= 1e-5


def test_starts() -> None:
    def first(config: peft.PeftConfig) -> Any:
        return from_peft_config(config)[0][0]

    for init in ("gaussian", "pissa", "pissa_niter_4", "olora"):
        assert first(peft.LoraConfig(target_modules=QV, init_lora_weights=init)).init == init
    prompt = {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"}
    text = {"prompt_tuning_init_text": "Say", "tokenizer_name_or_path": "gpt2"}
    told = first(peft.PromptTuningConfig(**prompt, **text, prompt_tuning_init="TEXT"))
    assert told == PromptTuning(num_virtual_tokens=2, init_text="Say", tokenizer_name_or_path="gpt2")
    assert first(peft.PromptTuningConfig(**prompt, prompt_tuning_init="SAMPLE_VOCAB")).init == "vocabulary"
    assert first(peft.PromptTuningConfig(**prompt)).init == "random"


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (peft.LoraConfig(target_modules=QV, init_lora_weights=False), "init_lora_weights=False"),
        (peft.LoraConfig(target_modules=QV, layer_replication=[(0, 1)]), "layer_replication="),
        (peft.LoraConfig(target_modules=QV, layers_to_transform=[0], layers_pattern="h"), "layers_pattern='h'"),
        (
            peft.LoraConfig(target_modules=QV, alora_invocation_tokens=[1, 2], use_dora=True),
            r"alora_invocation_tokens=\[1, 2\]",
        ),
        (peft.LoraConfig(target_modules=QV, inference_mode=True), "inference_mode=True.*init_adapter"),
        (peft.LoraConfig(target_modules=[]), r"target_modules=\[\]"),
        (peft.LoraConfig(target_modules=QV, layers_to_transform=[1], bias="lora_only"), "bias='lora_only'"),
        (peft.LoraConfig(target_modules=QV, exclude_modules=["v_proj"], bias="lora_only"), "bias='lora_only'"),
        (peft.LoraConfig(target_modules="all-linear", bias="lora_only"), "bias='lora_only'"),
        (
            peft.LoraConfig(target_modules=QV, target_parameters=["experts.down_proj"], layers_to_transform=[0]),
            "target_parameters beside layers_to_transform",
        ),
        (peft.AdaLoraConfig(total_step=900, target_modules=QV, init_lora_weights=False), "init_lora_weights=False"),
        (peft.IA3Config(target_modules=["k_proj", "down_proj"]), "leaves feedforward_modules out"),
        (peft.LoHaConfig(target_modules=QV, rank_dropout=0.5), "rank_dropout=0.5"),
        (peft.LoHaConfig(target_modules=QV, rank_pattern={"q_proj": 2}), "rank_pattern="),
        (peft.IA3Config(target_modules=QV, feedforward_modules=[], init_ia3_weights=False), "init_ia3_weights=False"),
        (peft.OFTConfig(target_modules=QV, coft=True), "coft=True"),
        (peft.MissConfig(target_modules=QV, init_weights="bat"), "init_weights='bat'"),
        (peft.PromptEncoderConfig(num_virtual_tokens=3), "P_TUNING"),
    ],
)
def test_what_is_not_served_is_named(config: peft.PeftConfig, named: str) -> None:
    with pytest.raises(PEFTError, match=named):
        from_peft_config(config)


def test_targets_that_are_left_out_are_told() -> None:
    with pytest.warns(UserWarning, match="LoraConfig leaves target_modules out"):
        methods, _ = from_peft_config(peft.LoraConfig(r=2, lora_dropout=0.1))
    assert methods == [LoRA(r=2, alpha=8, dropout=0.1)]
    assert from_peft_config(peft.IA3Config())[0] == [IA3()]


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.head(self.body(batch)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("several", [False, True])
def test_the_flag_takes_it(several: bool) -> None:
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["body"], modules_to_save=["head"])
    strategy = PEFTStrategy([config, BitFit()] if several else config)
    model = Module()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = L.Trainer(
        strategy=strategy, accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader(torch.ones(8, 4), batch_size=4))
    assert not torch.equal(model.head.weight, before["head.weight"])
    assert not torch.equal(model.body.weight, before["body.weight"])  # merged
    assert torch.equal(model.body.bias, before["body.bias"]) is not several
    assert model.body.peft["default"].lora_A.shape == (2, 4)


def test_what_is_trained_whole_comes_beside_what_the_flag_names() -> None:
    class Also(Module):
        train_also = ("own",)

        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Linear(2, 2)

    config = peft.LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"])
    for given, whole in ((None, {"own", "head"}), (["own"], {"own", "head"}), (["head"], {"head"})):
        model = Also()
        strategy = PEFTStrategy(config, train_also=given, merge_on_train_end=False)
        trainer = L.Trainer(
            strategy=strategy, accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(model, torch.utils.data.DataLoader(torch.ones(4, 4), batch_size=4))
        trained = {name.rpartition(".")[0] for name, value in model.named_parameters() if value.requires_grad}
        assert {name for name in trained if "peft" not in name} == whole


def test_names_are_names() -> None:
    """To HF PEFT a list holds the ends of names, and no groups of layers or globs."""

    def net() -> nn.ModuleDict:
        return nn.ModuleDict({"mlp": nn.Linear(4, 4), "attention": nn.Linear(4, 4), "rest": nn.Linear(4, 4)})

    config = peft.LoraConfig(r=2, target_modules=["mlp", "attention"], exclude_modules=["attention"])
    judge = peft.get_peft_model(net(), config)  # type: ignore[arg-type]
    expected = [name.split(".")[2] for name, _ in judge.named_parameters() if "lora_A" in name]
    model = net()
    assert inject(model, from_peft_config(config)[0]) == expected == ["mlp"]


def test_elsewhere_the_word_names_the_way() -> None:
    config = peft.LoraConfig(r=2, target_modules=["0"], use_dora=True)
    with pytest.raises(PEFTError, match=r"PEFTStrategy takes such an object.*from_peft_config"):
        inject(nn.Sequential(nn.Linear(4, 4)), config)  # type: ignore[arg-type]
    with pytest.raises(PEFTError, match="a configuration of HF PEFT"):
        from_peft_config({"peft_type": "LORA"})
    assert from_peft_config(config)[0] == [DoRA(r=2, alpha=8, target_modules=["0"])]
    tokens = peft.LoraConfig(target_modules=["0"], trainable_token_indices=[3])
    assert from_peft_config(tokens)[0][1:] == [NewTokens(token_indices=[3])]


def named_by_peft(**options: Any) -> set[str]:
    model = peft.get_peft_model(build("llama")[0], peft.LoraConfig(r=2, **options))
    names = (name.partition(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name)
    return {name.removeprefix("base_model.model.") for name in names}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0]}, "leaves nothing of .*'lm_head'"),
        (
            {"target_modules": ["q_proj", "model.layers.1.self_attn.v_proj"], "layers_to_transform": [0]},
            r"leaves nothing of .*'model\.layers\.1\.self_attn\.v_proj'",
        ),
        ({"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["mlp"]}, "'mlp' is the name of none of its"),
    ],
)
def test_what_hf_peft_adapts_is_not_left_out_in_silence(options: dict[str, Any], message: str) -> None:
    """It adapts what is named in full whatever the layers, and excludes no more than layers of the name."""
    assert named_by_peft(**options) > named_by_peft(target_modules=["q_proj"], layers_to_transform=[0])
    with pytest.raises(PEFTError, match=message):
        inject(build("llama")[0], *from_peft_config(peft.LoraConfig(r=2, **options))[0])


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*mlp.*"},
        {"target_modules": ["q_proj"], "exclude_modules": ["model.layers.0.self_attn.q_proj"]},
        {"target_modules": "all-linear", "exclude_modules": ["up_proj", "gate_proj"]},
    ],
)
@pytest.mark.filterwarnings("ignore:.*to HF PEFT these are names of layers")
def test_what_is_excluded_as_by_hf_peft(options: dict[str, Any]) -> None:
    model = build("llama")[0]
    inject(model, *from_peft_config(peft.LoraConfig(r=2, **options))[0])
    ours = {name.removesuffix(".peft") for name, _ in model.named_modules() if name.endswith(".peft")}
    assert ours == named_by_peft(**options)


def test_names_excluded_of_all_layers_are_told() -> None:
    config = peft.LoraConfig(target_modules="all-linear", exclude_modules=["mlp"])
    with pytest.warns(UserWarning, match="to HF PEFT these are names of layers"):
        from_peft_config(config)
