"""LoRA beside modules that are no linear layers: HF PEFT and formulas as judges."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import GQA, SPECIAL, build, outputs, randomise
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GptOssConfig, GptOssForCausalLM
from unchanged import assert_unchanged, snapshot

from lightning_peft import (
    IA3,
    OFT,
    DoRA,
    LoHa,
    LoKr,
    LoRA,
    PEFTError,
    PEFTMethod,
    SeriesAdapter,
    VeRA,
    combine,
    disable,
    eject,
    inject,
    load_adapter,
    merge,
    save_adapter,
    set_adapter,
    unmerge,
)
from lightning_peft.core.view import ModelView
from lightning_peft.formats.serving import serving_copy
from lightning_peft.strategy.optimizers.param_groups import learning_rate_ratios
from lightning_peft.targets.patterns import ALL_LINEAR

Build = Callable[[], nn.Module]


def seeded(make: Build) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().double().eval()


def assert_both_ways(make: Build, call: Callable[[nn.Module], Tensor], method: PEFTMethod, folder: Path) -> None:
    """Same outputs and gradients as HF PEFT with the same weights: from our file and from the one it writes of it."""
    model = seeded(make)
    inject(model, method)
    randomise(model)
    save_adapter(model, folder / "ours")
    judge = peft.PeftModel.from_pretrained(
        seeded(make), folder / "ours", is_trainable=True, autocast_adapter_dtype=False
    ).eval()
    add_once(judge)
    expected = call(judge)
    assert (expected - call(seeded(make))).abs().max() > 1e-3
    assert (call(model) - expected).abs().max() <= 1e-9

    for each in (model, judge):
        call(each).square().sum().backward()
    theirs = {name.replace(".default", ""): p.grad for name, p in judge.named_parameters() if p.requires_grad}
    ours = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(ours) == len(theirs) > 0
    for gradient in ours:
        near = [g for g in theirs.values() if g is not None and gradient is not None and g.shape == gradient.shape]
        assert gradient is not None
        assert gradient.abs().max() > 0
        assert min((gradient - other).abs().max() / other.abs().max() for other in near) <= 1e-9

    judge.save_pretrained(folder / "theirs")
    loaded = seeded(make)
    load_adapter(loaded, folder / "theirs")
    assert (call(loaded) - expected).abs().max() <= 1e-9


def add_once(judge: nn.Module) -> None:
    """HF PEFT 0.21 adds the change of an output projection twice (its pull request 3774): let it be added once."""
    for module in judge.modules():
        if isinstance(module, peft.tuners.lora.layer.MultiheadAttention):
            output: Any = module.base_layer.out_proj
            output.merge = output.unmerge = lambda **_: None


def assert_merges(make: Build, call: Callable[[nn.Module], Tensor], method: LoRA) -> None:
    """Outputs at the start, merged, unmerged and ejected."""
    model = seeded(make)
    before, base = snapshot(model), call(model)
    inject(model, method)
    assert torch.equal(call(model), base)
    randomise(model)
    tuned = call(model)
    report = merge(model)
    assert not report.kept
    assert (call(model) - tuned).abs().max() <= 1e-9
    unmerge(model)
    assert torch.equal(call(model), tuned)
    merge(model)
    eject(model)
    assert torch.equal(call(model), base)
    assert_unchanged(model, before)
    inject(model, method)
    randomise(model)
    merge(model, unload=True)
    assert not any(".peft." in name for name in model.state_dict())
    assert (call(model) - tuned).abs().max() <= 1e-9


CONVOLUTIONS: dict[str, Build] = {
    "1x1": lambda: nn.Conv2d(8, 12, 1),
    "kernel, stride, padding": lambda: nn.Conv2d(8, 12, (3, 2), stride=(2, 1), padding=(1, 0), bias=False),
    "same": lambda: nn.Conv2d(8, 12, 4, padding="same"),
    "one dimension": lambda: nn.Conv1d(8, 12, 3, stride=2, padding=1),
    "one dimension, 1": lambda: nn.Conv1d(8, 12, 1),
    "three dimensions": lambda: nn.Conv3d(8, 12, 2),
}
GROUPED: dict[str, Build] = {
    "groups": lambda: nn.Conv2d(8, 12, 3, groups=4),
    "depthwise": lambda: nn.Conv1d(8, 8, 3, groups=8, padding=1),
}
# HF PEFT gives A neither the dilation nor the padding mode: the first fails there, the second deviates at the borders.
OURS_ALONE: dict[str, Build] = {
    "dilation": lambda: nn.Conv2d(8, 12, 3, padding=2, dilation=2),
    "reflected": lambda: nn.Conv2d(8, 12, 3, padding=(1, 2), padding_mode="reflect"),
    "circular, same": lambda: nn.Conv1d(8, 12, 4, padding="same", dilation=2, padding_mode="circular"),
}


def convolution(layer: Build) -> tuple[Build, Callable[[nn.Module], Tensor]]:
    dims = len(layer().kernel_size)  # type: ignore[arg-type]
    shape = {1: (7,), 2: (7, 6), 3: (4, 5, 3)}[dims]
    x = torch.randn(2, 8, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return lambda: nn.Sequential(nn.Identity(), layer(), nn.Tanh()), lambda model: model(x)


@pytest.mark.parametrize("name", [*CONVOLUTIONS, *GROUPED])
def test_convolutions_as_in_peft(name: str, tmp_path: Path) -> None:
    make, call = convolution({**CONVOLUTIONS, **GROUPED}[name])
    assert_both_ways(make, call, LoRA(r=8, alpha=4, target_modules="1"), tmp_path)


@pytest.mark.parametrize("name", [*CONVOLUTIONS, *OURS_ALONE])
def test_convolutions_merge(name: str) -> None:
    make, call = convolution({**CONVOLUTIONS, **OURS_ALONE}[name])
    assert_merges(make, call, LoRA(r=4, target_modules="1"))


# HF PEFT squeezes dimensions that a kernel of one place in one dimension does not have.
@pytest.mark.parametrize("name", [name for name in CONVOLUTIONS if name != "one dimension, 1"])
def test_merged_convolutions_are_theirs(name: str, tmp_path: Path) -> None:
    make = convolution(CONVOLUTIONS[name])[0]
    model = seeded(make)
    inject(model, LoRA(r=4, target_modules="1"))
    randomise(model)
    save_adapter(model, tmp_path / "adapter")
    judge = peft.PeftModel.from_pretrained(seeded(make), tmp_path / "adapter", autocast_adapter_dtype=False)
    merge(model, unload=True)
    expected = judge.merge_and_unload().state_dict()
    for key, tensor in model.state_dict().items():
        assert (tensor - expected[key]).abs().max() <= 1e-9, key


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_convolutions_stay_attached(name: str) -> None:
    make, call = convolution(GROUPED[name])
    model = seeded(make)
    base = call(model)
    inject(model, LoRA(r=8, target_modules="1"))
    assert torch.equal(call(model), base)
    randomise(model)
    tuned = call(model)
    assert merge(model).kept == ("1",)
    assert torch.equal(call(model), tuned)
    with pytest.raises(PEFTError, match="cannot be merged"):
        merge(model, unload=True)


def test_servers_take_no_convolutions(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(8, 12, 3))
    inject(model, LoRA(r=4, target_modules="0"))
    save_adapter(model, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    with pytest.raises(PEFTError, match="'0', a convolution: servers"):
        serving_copy(config, tensors, "It")


OTHERS: dict[str, PEFTMethod] = {
    "LoHa": LoHa(r=3, alpha=12, target_modules="1"),
    "LoKr": LoKr(r=1, alpha=16, target_modules="1"),
    "LoKr, W2 whole": LoKr(r=4, alpha=16, decompose_factor=3, target_modules="1"),
    "LoKr, both": LoKr(r=1, alpha=64, decompose_both=True, target_modules="1"),
    "IA3": IA3(target_modules=["1"]),
    "IA3, inputs": IA3(target_modules=["1"], feedforward_modules=["1"]),
}


def is_for(method: PEFTMethod, make: Build) -> bool:
    return isinstance(make(), (nn.Conv2d, nn.Conv3d) if isinstance(method, IA3) else (nn.Conv1d, nn.Conv2d))


EVERY_CONVOLUTION = {**CONVOLUTIONS, **GROUPED, **OURS_ALONE}
OTHER_CELLS = [
    (name, kind) for name, made in EVERY_CONVOLUTION.items() for kind in OTHERS if is_for(OTHERS[kind], made)
]


# HF PEFT leaves out padding modes.
@pytest.mark.parametrize(
    ("name", "kind"), [cell for cell in OTHER_CELLS if cell[0] not in ("reflected", "circular, same")]
)
def test_other_methods_of_convolutions_as_in_peft(name: str, kind: str, tmp_path: Path) -> None:
    make, call = convolution(EVERY_CONVOLUTION[name])
    assert_both_ways(make, call, OTHERS[kind], tmp_path)


@pytest.mark.parametrize(("name", "kind"), OTHER_CELLS)
def test_other_methods_of_convolutions_merge(name: str, kind: str) -> None:
    make, call = convolution(EVERY_CONVOLUTION[name])
    assert_merges(make, call, OTHERS[kind])


def test_a_vector_that_may_be_of_either_side(tmp_path: Path) -> None:
    """As many channels come in as go out: HF PEFT's configuration alone says which are rescaled."""
    for feedforward in ([], ["1"]):
        make, call = convolution(lambda: nn.Conv2d(8, 8, 3))
        judge = peft.get_peft_model(seeded(make), peft.IA3Config(target_modules=["1"], feedforward_modules=feedforward))
        randomise(judge)
        judge.save_pretrained(tmp_path)
        model = seeded(make)
        load_adapter(model, tmp_path)
        assert (call(model) - call(judge.base_model.model)).abs().max() <= 1e-9


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (peft.OFTConfig(r=0, oft_block_size=4, target_modules=["0"]), "a Conv2d, of which there is no OFT here"),
        (peft.LoraConfig(r=2, target_modules=["0"], use_dora=True), "a Conv2d, of which there is no DoRA here"),
    ],
    ids=["OFT", "DoRA"],
)
def test_other_files_of_convolutions_are_refused(config: peft.PeftConfig, message: str, tmp_path: Path) -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Conv2d(8, 12, 3), nn.Flatten(), nn.Linear(12, 2))

    peft.get_peft_model(model(), config).save_pretrained(tmp_path)
    with pytest.raises(PEFTError, match=f"{message}.*merge_and_unload"):
        load_adapter(model(), tmp_path)


@pytest.mark.parametrize("method", [OFT(target_modules=["0"]), DoRA(target_modules=["0"])], ids=["OFT", "DoRA"])
def test_other_methods_say_what_convolutions_have(method: PEFTMethod) -> None:
    with pytest.raises(PEFTError, match=r"\(Conv2d\)\. LoRA adapts convolutions; LoHa and LoKr those in one and two"):
        inject(nn.Sequential(nn.Conv2d(8, 12, 3)), method)


def test_groups_that_cannot_share_the_rank() -> None:
    model = nn.Sequential(nn.Conv2d(8, 12, 3, groups=4))
    with pytest.raises(PEFTError, match="'0' cannot be adapted: its 4 groups cannot share the rank 6"):
        inject(model, LoRA(r=6, target_modules="0"))
    assert inject(model, LoRA(r=6, target_modules="0", rank_pattern={"0": 4})) == ["0"]


def test_a_rank_above_that_of_a_convolution() -> None:
    with pytest.raises(PEFTError, match="'0' is 27 → 5: the rank of an update of it is at most 5"):
        inject(nn.Sequential(nn.Conv2d(3, 5, 3)), LoRA(r=6, target_modules="0"))


def test_a_convolution_in_a_transformers_model(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return build("vit")[0]

    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def call(model: nn.Module) -> Any:
        return model(pixel_values=pixels).logits

    target = next(name for name, module in make().named_modules() if isinstance(module, nn.Conv2d))
    method = LoRA(r=4, target_modules=[target, "attention"])
    assert_both_ways(make, call, method, tmp_path)
    assert_merges(make, call, method)


class Attention(nn.Module):
    """Attention with what it can be called with."""

    def __init__(self, call: dict[str, Any], **options: Any) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, **options)
        self.call = call

    def forward(self, x: Tensor, memory: tuple[Tensor, Tensor]) -> Tensor:
        output, weights = self.attend(x, *memory, **self.call)
        return output if weights is None else torch.cat([output.flatten(), weights.flatten()])


PADDING = torch.tensor([[False, False, True], [False, False, False]])
ATTENTION: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "batch first": ({"need_weights": False}, {"batch_first": True}),
    "sequence first": ({}, {"bias": False}),
    "masks": ({"key_padding_mask": PADDING, "attn_mask": torch.zeros(4, 3)}, {"batch_first": True}),
    "weights of every head": ({"average_attn_weights": False}, {"batch_first": True, "add_zero_attn": True}),
    "biases for keys and values": ({}, {"batch_first": True, "add_bias_kv": True}),
}
SEPARATE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "other keys and values": ({}, {"batch_first": True, "kdim": 6, "vdim": 5}),
}


def attention(name: str) -> tuple[Build, Callable[[nn.Module], Tensor]]:
    call, options = {**ATTENTION, **SEPARATE}[name]
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        return x if options.get("batch_first") else x.transpose(0, 1)

    x = random(2, 4, 8)
    memory = random(2, 3, options.get("kdim", 8)), random(2, 3, options.get("vdim", 8))
    return lambda: Attention(call, **options), lambda model: model(x, memory)


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_as_in_peft(name: str, tmp_path: Path) -> None:
    make, call = attention(name)
    assert_both_ways(make, call, LoRA(r=4, alpha=4, target_modules="attend"), tmp_path)


@pytest.mark.parametrize("name", [*ATTENTION, *SEPARATE])
def test_attention_merges(name: str, tmp_path: Path) -> None:
    make, call = attention(name)
    assert_merges(make, call, LoRA(r=2, target_modules="attend"))
    model = seeded(make)
    inject(model, LoRA(r=2, target_modules="attend"))
    randomise(model)
    save_adapter(model, tmp_path / "adapter")
    loaded = seeded(make)
    load_adapter(loaded, tmp_path / "adapter")
    assert torch.equal(call(loaded), call(model))


@pytest.mark.parametrize("name", [*ATTENTION, *SEPARATE])
def test_attention_reads_the_changed_weights(name: str) -> None:
    """Against a model with W0 + scale · B A in its weights, computed here."""
    make, call = attention(name)
    model, changed = seeded(make), seeded(make)
    inject(model, LoRA(r=2, alpha=6, target_modules="attend"))
    randomise(model)
    state = model.state_dict()
    for key, weight in changed.named_parameters():
        factors = key.removesuffix("_weight").removesuffix(".weight").rpartition("attend.")[2].replace(".", "_")
        lead = f"attend.peft.default.factors.{factors}.lora_"
        if f"{lead}A" in state:
            weight.data += 3 * state[f"{lead}B"] @ state[f"{lead}A"]
    assert len([key for key in state if key.endswith("lora_A")]) == (4 if name in SEPARATE else 2)
    assert (call(model) - call(changed)).abs().max() <= 1e-12
    with torch.inference_mode():
        assert (call(model) - call(changed)).abs().max() <= 1e-12


def transformer() -> tuple[Build, Callable[[nn.Module], Tensor]]:
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return lambda: build("torch_encoder")[0], lambda model: model(x)


@pytest.fixture
def _no_fast_path() -> Iterator[None]:
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.usefixtures("_no_fast_path")  # which HF PEFT's wrapper does not see
@pytest.mark.parametrize("target", ["attention", ALL_LINEAR, "self_attn"])
def test_attention_in_presets(target: str, tmp_path: Path) -> None:
    make, call = transformer()
    names = inject(make(), LoRA(r=4, target_modules=target))
    assert [name for name in names if name.endswith("self_attn")] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert any(name.endswith("linear1") for name in names) == (target == ALL_LINEAR)
    assert_both_ways(make, call, LoRA(r=4, target_modules=target), tmp_path)
    assert_merges(make, call, LoRA(r=4, target_modules=target))


def test_a_failed_call_leaves_nothing_behind() -> None:
    make, call = transformer()
    model = seeded(make)
    inject(model, LoRA(r=4, target_modules="attention"))
    randomise(model)
    expected = call(model)
    with pytest.raises(AssertionError, match="expecting embedding dimension"):
        model(torch.randn(2, 5, 31, dtype=torch.float64))
    host = model.get_submodule("layers.0.self_attn")
    assert "in_proj_weight" not in host.__dict__
    assert torch.equal(call(model), expected)


def test_attention_under_activation_checkpointing() -> None:
    make, _ = transformer()
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = []
    for checkpointing in (False, True):
        model = seeded(make)
        inject(model, LoRA(r=4, target_modules="attention"))
        randomise(model)
        y = x
        for layer in model.layers:  # type: ignore[union-attr]
            y = checkpoint(layer, y, use_reentrant=False) if checkpointing else layer(y)
        y.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) == 8
    assert all((a - b).abs().max() <= 1e-12 * a.abs().max() for a, b in zip(*gradients, strict=True))


def test_compiled_attention() -> None:
    make, call = transformer()
    model = seeded(make)
    inject(model, LoRA(r=4, target_modules="attention"))
    randomise(model)
    compiled = torch.compile(model, backend="eager")
    assert (call(compiled) - call(model)).abs().max() <= 1e-12
    merge(model)
    assert (call(compiled) - call(model)).abs().max() <= 1e-12


def test_an_embedding_with_sparse_gradients() -> None:
    """What is trained is dense; the frozen weight has no gradient, sparse or not."""
    gradients = []
    for sparse in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(30, 8, sparse=sparse, padding_idx=0), nn.Linear(8, 1))
        inject(model, LoRA(r=2, target_modules="0"))
        randomise(model)
        model(torch.tensor([[1, 2], [2, 0]])).square().sum().backward()
        torch.optim.Adagrad([p for p in model.parameters() if p.requires_grad]).step()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_dropout_beside_attention() -> None:
    """Named, attention cannot have it; where a preset finds it nothing is dropped there, and that is said."""
    with pytest.raises(PEFTError, match=r"dropout=0\.1 was given, but 'layers\.0\.self_attn'"):
        inject(build("torch_encoder")[0], LoRA(r=4, dropout=0.1, target_modules=["self_attn", "linear1"]))
    model, given = build("torch_encoder")
    with pytest.warns(
        UserWarning,
        match=r"dropout=0\.1 has no effect on 'layers\.0\.self_attn', 'layers",
    ):
        names = inject(model, LoRA(r=4, dropout=0.1))
    assert [name.rpartition(".")[2] for name in names] == ["self_attn", "linear1", "linear2"] * 2
    exact = build("torch_encoder")[0]
    inject(exact, LoRA(r=4))
    for twin in (model, exact):
        randomise(twin)
    assert torch.equal(outputs(model, given), outputs(exact, given))


def test_attention_trained_with_a_frozen_A() -> None:
    model = build("torch_encoder")[0]
    inject(model, LoRA(r=4, target_modules="attention", freeze_A=True, loraplus_lr_ratio=4))
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_B"}
    assert set(learning_rate_ratios(ModelView(model)).values()) == {4}


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
MIXTURES: dict[str, list[str]] = {
    "experts": EXPERTS,
    "one weight": ["experts.down_proj", "q_proj"],
    "router": ["mlp.gate.weight", "experts.down_proj"],
}
# torch has no grouped_mm in float64.
FORMS = {"eager": torch.float64, "batched_mm": torch.float64, "grouped_mm": torch.float32}


def mixture(family: str, form: str = "eager") -> tuple[Build, Callable[[nn.Module], Tensor]]:
    def make() -> nn.Module:
        model = build(family)[0]
        model.set_experts_implementation(form)  # type: ignore[operator]
        return model

    return make, lambda model: outputs(model, build(family)[1])


@pytest.mark.parametrize(("family", "case"), [*(("mixtral", case) for case in MIXTURES), ("qwen3_moe", "experts")])
def test_experts_as_in_peft(family: str, case: str, tmp_path: Path) -> None:
    make, call = mixture(family)
    assert_both_ways(make, call, LoRA(r=4, alpha=2, target_modules=MIXTURES[case]), tmp_path)


@pytest.mark.parametrize("form", ["eager", "batched_mm"])
def test_experts_merge(form: str) -> None:
    make, call = mixture("mixtral", form)
    assert_merges(make, call, LoRA(r=2, target_modules=EXPERTS, rank_pattern={"gate_up_proj": 4}))


@pytest.mark.parametrize("form", FORMS)
def test_experts_read_the_changed_weights(form: str) -> None:
    """Each expert against its own W0 + scale · B A, whose factors are cut out of the file's layout here."""
    make, call = mixture("qwen3_moe", form)
    model, changed = seeded(make).to(FORMS[form]), seeded(make).to(FORMS[form])
    inject(model, LoRA(r=2, alpha=6, target_modules=EXPERTS))
    randomise(model)
    state, count = model.state_dict(), 0
    for key, weight in changed.named_parameters():
        host, _, leaf = key.rpartition(".")
        lead = f"{host}.peft.default.factors.{leaf}.lora_"
        if f"{lead}A" in state:
            for expert in range(len(weight)):
                a, b = state[f"{lead}A"][2 * expert : 2 * expert + 2], state[f"{lead}B"][:, expert :: len(weight)]
                weight.data[expert] += 3 * b @ a
                count += 1
    assert count == 2 * 2 * 4
    tolerance = 1e-12 if FORMS[form] == torch.float64 else 1e-5
    assert (call(model) - call(changed)).abs().max() <= tolerance


def test_experts_stored_the_other_way_round() -> None:
    config = GptOssConfig(**GQA, head_dim=8, num_local_experts=4, num_experts_per_tok=2, **SPECIAL)
    ids = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))

    def make() -> nn.Module:
        model = GptOssForCausalLM(config)
        model.set_experts_implementation("eager")
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
        return model

    def call(model: nn.Module) -> Tensor:
        logits: Tensor = model(input_ids=ids).logits
        return logits

    model = seeded(make)
    inject(model, LoRA(r=2, target_modules="experts.down_proj"))
    factors = model.get_submodule("model.layers.0.mlp.experts.peft.default.factors.down_proj")
    # From 64 features to 32, four experts of rank 2.
    assert factors.lora_A.shape == (8, 64)
    assert factors.lora_B.shape == (32, 8)
    assert_merges(make, call, LoRA(r=2, target_modules="experts.down_proj"))


def test_experts_of_all_linear_in_peft(tmp_path: Path) -> None:
    """HF PEFT's own choice: attention, experts and routers, with twice the rank where two matrices are one."""
    make, call = mixture("mixtral")
    judge = peft.get_peft_model(seeded(make), peft.LoraConfig(r=4, target_modules="all-linear")).double().eval()
    randomise(judge)
    judge.save_pretrained(tmp_path / "theirs")
    loaded = seeded(make)
    load_adapter(loaded, tmp_path / "theirs")
    assert (call(loaded) - call(judge)).abs().max() <= 1e-9
    save_adapter(loaded, tmp_path / "ours")
    judge = peft.PeftModel.from_pretrained(seeded(make), tmp_path / "ours", autocast_adapter_dtype=False).eval()
    assert (call(loaded) - call(judge)).abs().max() <= 1e-9


class Odd(nn.Module):
    def __init__(self, **weights: Tensor) -> None:
        super().__init__()
        for name, value in weights.items():
            self.register_parameter(name, nn.Parameter(value, requires_grad=value.is_floating_point()))


@pytest.mark.parametrize(
    ("weight", "found"),
    [(torch.zeros(2, 3, 4, 5), r"\[2, 3, 4, 5\]"), (torch.zeros(2, 3, 4, dtype=torch.uint8), "uint8")],
    ids=["four dimensions", "packed"],
)
def test_experts_of_an_unknown_form(weight: Tensor, found: str) -> None:
    model = nn.ModuleDict({"experts": Odd(up=weight, down=torch.zeros(2, 4, 3))})
    with pytest.raises(PEFTError, match=f"'up' of a Odd is .*{found}"):
        inject(model, LoRA(r=1, target_modules="experts.up"))
    with pytest.raises(PEFTError, match=r"Odd.*Name the modules inside: experts\.up, experts\.down"):
        inject(model, LoRA(r=1, target_modules="experts"))
    with pytest.raises(PEFTError, match=r"'experts\.up'.*only modules that cannot be adapted|matches no module"):
        inject(model, DoRA(r=1, target_modules="experts.up"))


def test_experts_are_selected_by_name_layer_and_exclusion() -> None:
    def hosts(**options: Any) -> list[str]:
        model = build("mixtral")[0]
        inject(model, LoRA(r=2, **options))
        return [
            name.split(".peft.default.")[0] + ":" + name.split(".")[-2]
            for name in model.state_dict()
            if "lora_A" in name
        ]

    every = hosts(target_modules="experts.*")
    assert len(every) == 4
    assert hosts(target_modules="experts.*", layers=[1]) == every[2:]
    assert hosts(target_modules=["experts.*"], exclude_modules="gate_up_proj") == every[1::2]
    assert [name for name in hosts() if "experts" in name] == every


BESIDE_OTHERS: dict[str, tuple[Build, LoRA]] = {
    "convolution": (lambda: nn.Sequential(nn.Conv2d(8, 12, 3)), LoRA(r=4, target_modules="0")),
    "attention": (lambda: build("torch_encoder")[0], LoRA(r=4, target_modules="self_attn")),
    "parts": (lambda: build("gpt2")[0], LoRA(r=4, target_modules="c_attn", fused_parts=["q"])),
    "start in the weight": (lambda: build("gpt2")[0], LoRA(r=4, target_modules="c_attn", init="pissa")),
}


@pytest.mark.parametrize("name", BESIDE_OTHERS)
def test_what_cannot_be_combined_is_named(name: str) -> None:
    make, method = BESIDE_OTHERS[name]
    model = make()
    hosts = inject(model, method, name="one")
    inject(model, method, name="two")
    with pytest.raises(PEFTError, match=f"combine: 'one' has a .*Adapter on {hosts[0]!r}"):
        combine(model, ["one", "two"], [0.5, 0.5], name="both")
    set_adapter(model, "two")


def test_adapters_of_attention_switch() -> None:
    make, call = transformer()
    model = seeded(make)
    base = call(model)
    for name in ("one", "two"):
        inject(model, LoRA(r=2, target_modules="attention"), name=name, seed=len(name))
        set_adapter(model, name)
        randomise(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2 if parameter.requires_grad and name == "two" else 1)
    two = call(model)
    set_adapter(model, "one")
    one = call(model)
    assert not torch.equal(one, two)
    with disable(model):  # torch has another kernel for frozen attention
        assert (call(model) - base).abs().max() <= 1e-12
    set_adapter(model, "two")
    assert torch.equal(call(model), two)


@pytest.mark.parametrize(
    "method",
    [
        LoRA(r=2),
        LoRA(r=2, target_modules="attention"),
        DoRA(r=2, target_modules=["linear1", "linear2"]),
        VeRA(r=2, target_modules=["linear1", "linear2"]),
        IA3(target_modules=["linear1", "linear2"], feedforward_modules=["linear2"]),
        SeriesAdapter(bottleneck=2, target_modules=["linear2"]),
    ],
    ids=lambda method: f"{method.name} {method.target_modules}",
)
def test_nested_texts(method: PEFTMethod) -> None:
    """Of padded texts torch's encoder makes a nested tensor in eval mode; in train mode, the judge, it does not."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), 2)
    inject(encoder, method)
    randomise(encoder)
    x, padding = torch.randn(3, 5, 8), torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]).bool()
    expected = encoder.train()(x, src_key_padding_mask=padding)[~padding]
    with torch.no_grad():
        found = encoder.eval()(x, src_key_padding_mask=padding)[~padding]
    assert (found - expected).abs().max() <= 1e-5
