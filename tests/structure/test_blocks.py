"""Where attention, MLP and norms are in every family; what a bottleneck around them computes."""

import dataclasses
import re
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as t
from families import ALL_FAMILIES, build, outputs, randomise
from torch import Tensor, nn

from lightning_peft import IA3, Compacter, ParallelAdapter, PEFTError, PEFTMethod, SeriesAdapter, eject, inject
from lightning_peft.core.calls import on_hidden
from lightning_peft.core.view import ModelView
from lightning_peft.structure.blocks import Block, find_blocks, layer_norms

LLAMA = ("model.layers.0", ("self_attn.q_proj", "self_attn.o_proj"), ("mlp.gate_proj", "mlp.down_proj"))
BERT = ("attention.self.query", "attention.output.dense"), ("intermediate.dense", "output.dense")
BLOOM = ("self_attention.query_key_value", "self_attention.dense"), ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
BART = ("self_attn.q_proj", "self_attn.out_proj"), ("fc1", "fc2")
TORCH = ("self_attn", "self_attn"), ("linear1", "linear2")

# The first layer, and the first and last module of its attention and of its MLP.
EXPECTED: dict[str, tuple[str, tuple[str, str], tuple[str, str]]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"), LLAMA),
    **dict.fromkeys(("mixtral", "qwen3_moe"), (*LLAMA[:2], ("mlp", "mlp"))),
    "phi3": ("model.layers.0", ("self_attn.qkv_proj", "self_attn.o_proj"), ("mlp.gate_up_proj", "mlp.down_proj")),
    "gpt2": ("transformer.h.0", ("attn.c_attn", "attn.c_proj"), ("mlp.c_fc", "mlp.c_proj")),
    "gpt_neox": ("gpt_neox.layers.0", ("attention.query_key_value", "attention.dense"), BLOOM[1]),
    "opt": ("model.decoder.layers.0", *BART),
    "bloom": ("transformer.h.0", *BLOOM),
    "falcon": ("transformer.h.0", *BLOOM),
    "bert": ("bert.encoder.layer.0", *BERT),
    "roberta": ("roberta.encoder.layer.0", *BERT),
    "deberta_v2": ("deberta.encoder.layer.0", ("attention.self.query_proj", BERT[0][1]), BERT[1]),
    "distilbert": (
        "distilbert.transformer.layer.0",
        ("attention.q_lin", "attention.out_lin"),
        ("ffn.lin1", "ffn.lin2"),
    ),
    "t5": (
        "encoder.block.0",
        ("layer.0.SelfAttention.q", "layer.0.SelfAttention.o"),
        ("layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wo"),
    ),
    "bart": ("model.encoder.layers.0", *BART),
    "whisper": ("model.encoder.layers.0", *BART),
    "vit": ("vit.layers.0", ("attention.q_proj", "attention.o_proj"), ("mlp.fc1", "mlp.fc2")),
    "clip": ("text_model.encoder.layers.0", BART[0], ("mlp.fc1", "mlp.fc2")),
    "torch_encoder": ("layers.0", *TORCH),
    "torch_decoder": ("layers.0", *TORCH),
}
# Encoder and decoder layers; attention blocks, of which a decoder layer beside an encoder has two.
COUNTS = {
    **dict.fromkeys(("t5", "bart", "whisper"), (4, 6)),
    "clip": (4, 4),
    "torch_decoder": (2, 4),
}


def first_of(blocks: list[Block], kind: str) -> Block:
    return next(block for block in blocks if block.kind == kind)


@pytest.mark.parametrize("family", sorted(ALL_FAMILIES.keys() - {"sequential"}))
def test_blocks_are_found(family: str) -> None:
    model, _ = build(family)
    blocks = find_blocks(ModelView(model))
    layer, attention, mlp = EXPECTED[family]
    for kind, (first, last) in (("attention", attention), ("mlp", mlp)):
        block = first_of(blocks, kind)
        assert (block.layer, block.first, block.last) == (layer, f"{layer}.{first}", f"{layer}.{last}")
        assert block.width == 32
    layers, attentions = COUNTS.get(family, (2, 2))
    assert len({block.layer for block in blocks}) == layers
    assert sum(block.kind == "attention" for block in blocks) == attentions
    assert sum(block.kind == "mlp" for block in blocks) == layers
    assert len({block.last for block in blocks}) == len(blocks)
    assert len(find_blocks(ModelView(model), ["mlp"], layers=[1])) == layers // 2


ROLES = {
    "llama": {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"},
    "phi3": {"qkv": "qkv_proj", "o": "o_proj"},
    "gpt2": {"qkv": "c_attn", "o": "c_proj"},
    "bloom": {"qkv": "query_key_value", "o": "dense"},
    "bert": {"q": "query", "k": "key", "v": "value", "o": "dense"},
    "t5": {"q": "q", "k": "k", "v": "v", "o": "o"},
    "distilbert": {"q": "q_lin", "k": "k_lin", "v": "v_lin", "o": "out_lin"},
}


@pytest.mark.parametrize("family", ROLES)
def test_projections_have_roles(family: str) -> None:
    block = first_of(find_blocks(ModelView(build(family)[0])), "attention")
    assert {role: name.rsplit(".", 1)[-1] for role, name in block.roles.items()} == ROLES[family]


def test_a_single_layer_is_a_model_too() -> None:
    blocks = find_blocks(ModelView(nn.TransformerEncoderLayer(16, 2, 32)))
    assert [(b.kind, b.layer, b.first, b.last) for b in blocks] == [
        ("attention", "", "self_attn", "self_attn"),
        ("mlp", "", "linear1", "linear2"),
    ]


class AttentionOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"self_attn": nn.MultiheadAttention(8, 2)}) for _ in range(3))
        self.project = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))


def test_what_is_beside_a_stack_of_layers_is_no_mlp() -> None:
    model = AttentionOnly()
    assert [b.last for b in find_blocks(ModelView(model), ["attention"])] == [f"layers.{i}.self_attn" for i in range(3)]
    with pytest.raises(PEFTError, match="No mlp block"):
        find_blocks(ModelView(model))


class OddExperts(nn.Module):
    """A mixture of experts in one parameter, as no model in transformers has it."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(32, 4, bias=False)
        self.experts = nn.Parameter(torch.randn(4, 32, 32) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...e,eoi,...i->...o", self.router(x).softmax(-1), self.experts, x)


@pytest.mark.parametrize("odd", [[1], [0, 1]])
@pytest.mark.parametrize(
    "method", [SeriesAdapter(bottleneck=4), ParallelAdapter(bottleneck=4), Compacter(bottleneck=8), IA3()], ids=str
)
def test_experts_of_an_unknown_form_are_refused(method: PEFTMethod, odd: list[int]) -> None:
    model, inputs = build("mistral")
    for layer in odd:
        model.model.layers[layer].mlp = OddExperts()
    keys = list(model.state_dict())
    message = rf"The MLP of 'model\.layers\.{odd[0]}' .*'model\.layers\.{odd[0]}\.mlp' is a OddExperts .*\[4, 32, 32\]"
    with pytest.raises(PEFTError, match=message + ".*Name modules to adapt in target_modules"):
        inject(model, method)
    assert list(model.state_dict()) == keys
    # What to do, as the error says.
    inject(model, SeriesAdapter(bottleneck=4, target_modules=["mlp"]))
    eject(model)
    if odd == [1]:
        inject(model, dataclasses.replace(method, layers=[0]))  # type: ignore[type-var]
        assert torch.isfinite(outputs(model, inputs)).all()


def test_norms_are_found() -> None:
    assert [name for name in layer_norms(ModelView(build("t5")[0])) if name.startswith("encoder")] == [
        *(f"encoder.block.{i}.layer.{j}.layer_norm" for i in (0, 1) for j in (0, 1)),
        "encoder.final_layer_norm",
    ]
    assert "model.layers.0.self_attn.q_norm" in layer_norms(ModelView(build("qwen3")[0]))
    others = nn.Sequential(nn.BatchNorm1d(3), nn.GroupNorm(1, 3), nn.LayerNorm(3, elementwise_affine=False))
    assert not layer_norms(ModelView(others))


def capture(model: nn.Module, inputs: dict[str, Any], block: Block) -> tuple[Tensor, Tensor]:
    """What a block is given and what it gives."""
    seen: dict[str, Any] = {}

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen["input"] = args[0] if args else next(iter(kwargs.values()))

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        # Falcon adds to it in place.
        seen["output"] = (output[0] if isinstance(output, tuple) else output).clone()

    handles = [
        model.get_submodule(block.first).register_forward_pre_hook(before, with_kwargs=True, prepend=True),
        model.get_submodule(block.last).register_forward_hook(after, with_kwargs=True),
    ]
    with torch.no_grad():
        outputs(model, inputs)
    for handle in handles:
        handle.remove()
    return seen["input"], seen["output"]


@pytest.mark.parametrize("kind", ["attention", "mlp"])
@pytest.mark.parametrize("family", sorted(ALL_FAMILIES.keys() - {"sequential"}))
def test_the_equations_around_a_block(family: str, kind: Any) -> None:
    """In the first layer both models see the same input, so what an adapter adds there can be computed by hand."""
    # Experts are multiplied by a kernel that knows no float64.
    dtype, tolerance = (torch.float32, 1e-5) if family in ("mixtral", "qwen3_moe") else (torch.float64, 1e-9)
    model, inputs = build(family)
    model.to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    block = first_of(find_blocks(ModelView(model)), kind)
    x, h = capture(model, inputs, block)
    for method, given, scale, function in (
        (ParallelAdapter(placement=[kind], bottleneck=3, scale=2.5, activation="relu"), x, 2.5, torch.relu),
        (
            SeriesAdapter(placement=[kind], bottleneck=3, activation="tanh", scale=0.5, train_norms=False),
            h,
            0.5,
            torch.tanh,
        ),
    ):
        adapted, _ = build(family)
        adapted.to(dtype)
        inject(adapted, method)
        randomise(adapted)
        lead = f"{block.last}.peft.default."
        down, up, down_bias, up_bias = (
            adapted.get_parameter(lead + name).detach() for name in ("down", "up", "down_bias", "up_bias")
        )
        hidden = function(torch.einsum("...i,bi->...b", given, down) + down_bias)
        expected = h + scale * (torch.einsum("...b,ob->...o", hidden, up) + up_bias)
        _, found = capture(adapted, inputs, block)
        assert (found - h).abs().max() > 1e-3
        assert (found - expected).abs().max() <= tolerance


def test_the_equation_before_the_mlp_and_after_the_layer() -> None:
    model, inputs = build("llama")
    method = SeriesAdapter(preset="llm_adapters", placement=["mlp_input", "layer"], bottleneck=3)
    inject(model, method)
    randomise(model)
    layer = model.get_submodule("model.layers.0")
    x = torch.randn(2, 5, 32)

    def bottleneck(host: str, h: Tensor) -> Tensor:
        down, up = (model.get_parameter(f"{host}.peft.default.{name}") for name in ("down", "up"))
        return h + torch.tanh(h @ down.T) @ up.T

    for name in ("gate_proj", "up_proj"):
        linear = layer.get_submodule(f"mlp.{name}")
        expected = bottleneck(f"model.layers.0.mlp.{name}", x) @ linear.weight.T
        assert torch.allclose(linear(x), expected, atol=1e-5)
    base, _ = build("llama")
    seen: list[Tensor] = []
    for each, place in ((base, 0), (model, 1)):
        if each is model:
            for name in ("gate_proj", "up_proj"):
                for i in (0, 1):
                    nn.init.zeros_(model.get_parameter(f"model.layers.{i}.mlp.{name}.peft.default.up"))
        handle = each.get_submodule("model.layers.0").register_forward_hook(lambda m, a, o: seen.append(o))
        outputs(each, inputs)
        handle.remove()
        assert len(seen) == place + 1
    assert torch.allclose(seen[1], bottleneck("model.layers.0", seen[0]), atol=1e-5)


# The norm that each layer ends in. Layers of other families end in a residual connection.
LAST_NORM = {
    **dict.fromkeys(("bert", "roberta", "deberta_v2"), "output.LayerNorm"),
    "distilbert": "output_layer_norm",
    "bart": "final_layer_norm",
    "torch_encoder": "norm2",
    "torch_decoder": "norm3",
}


@pytest.mark.parametrize("alias", [False, True])
@pytest.mark.parametrize("family", sorted(ALL_FAMILIES.keys() - {"sequential"}))
def test_the_equation_of_pfeiffer(family: str, alias: bool) -> None:
    """N(R + f(H)) where the layer gives H = N(R), also if someone's hook gives another tensor of the same memory."""
    dtype, tolerance = (torch.float32, 1e-5) if family in ("mixtral", "qwen3_moe") else (torch.float64, 1e-9)
    model, inputs = build(family)
    model.to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    name = find_blocks(ModelView(model))[0].layer
    layer, seen = model.get_submodule(name), {}

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen["H"] = (output[0] if isinstance(output, tuple) else output).detach().clone()

    layer.register_forward_hook(after, with_kwargs=True)
    norm = layer.get_submodule(LAST_NORM[family]) if family in LAST_NORM else None
    if norm is not None:
        norm.register_forward_pre_hook(lambda module, args: seen.update(R=args[0].detach().clone()))
        if alias:
            norm.register_forward_hook(lambda module, args, output: output.view_as(output))
    outputs(model, inputs)
    given = dict(seen)
    inject(model, SeriesAdapter(preset="pfeiffer", bottleneck=3))
    randomise(model)
    down, up, down_bias, up_bias = (
        model.get_parameter(f"{name}.peft.default.{key}") for key in ("down", "up", "down_bias", "up_bias")
    )
    hidden = torch.relu(torch.einsum("...i,bi->...b", given["H"], down) + down_bias)
    branch = torch.einsum("...b,ob->...o", hidden, up) + up_bias
    if norm is None:
        expected = given["H"] + branch
    else:
        expected = nn.functional.layer_norm(given["R"] + branch, (32,), norm.weight, norm.bias, norm.eps)
    outputs(model, inputs)
    assert (seen["H"] - given["H"]).abs().max() > 1e-3
    assert (seen["H"] - expected).abs().max() <= tolerance


def test_pfeiffer_s_place_compiles() -> None:
    for family in ("bert", "opt"):
        model, inputs = build(family)
        inject(model, SeriesAdapter(preset="pfeiffer", bottleneck=3))
        randomise(model)
        expected = outputs(model, inputs)
        layers = find_blocks(ModelView(model))[0].layer.rpartition(".")[0]
        for layer in model.get_submodule(layers):
            layer.compile(backend="eager", fullgraph=True)
        assert torch.equal(outputs(model, inputs), expected)


@pytest.mark.parametrize("family", ["bert", "bart", "opt"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_pfeiffer_s_place_under_activation_checkpointing(family: str, reentrant: bool) -> None:
    gradients: list[list[Tensor]] = []
    for options in (None, {"use_reentrant": reentrant}):
        model, inputs = build(family)
        model.train()
        for module in model.modules():
            # BART drops out by a rate of its own.
            vars(module).update({key: 0.0 for key in ("p", "dropout") if isinstance(vars(module).get(key), float)})
        if options is not None:
            model.gradient_checkpointing_enable(options)
            model.enable_input_require_grads()
        inject(model, SeriesAdapter(preset="pfeiffer", bottleneck=3))
        randomise(model)
        refused = ""
        try:
            outputs(model, inputs).square().sum().backward()
        except PEFTError as error:
            refused = str(error)
        if options is not None and reentrant and family in LAST_NORM and refused:
            # Older releases of transformers leave the norm its graph: there it is right.
            assert re.search(r"gradients would be lost.*'use_reentrant': False", refused)
            return
        assert not refused
        gradients.append([p.grad for name, p in model.named_parameters() if ".peft." in name])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        assert (plain - checkpointed).abs().max() <= 1e-6 * plain.abs().max()


def test_a_norm_that_is_trained_whole_cannot_be_listened_to() -> None:
    with pytest.raises(PEFTError, match=r"residual' listens to 'bert\.encoder.*give train_norms=True"):
        inject(build("bert")[0], SeriesAdapter(preset="pfeiffer"), train_also=["LayerNorm"])


Named = namedtuple("Named", ["hidden", "rest"])


@dataclass
class Output:
    hidden: Tensor
    rest: Any = None


def test_outputs_of_all_kinds() -> None:
    one, rest = torch.ones(2), object()
    assert torch.equal(on_hidden(one, lambda h: h + 1), one + 1)
    for output in ((one, rest), [one, rest], Named(one, rest)):
        changed = on_hidden(output, lambda h: h + 1)
        assert type(changed) is type(output)
        assert torch.equal(changed[0], one + 1)
        assert changed[1] is rest
    changed = on_hidden(Output(one, rest), lambda h: h + 1)
    assert torch.equal(changed.hidden, one + 1)
    assert changed.rest is rest
    hf = on_hidden(t.modeling_outputs.BaseModelOutput(last_hidden_state=one), lambda h: h + 1)
    assert torch.equal(hf.last_hidden_state, one + 1)
    assert torch.equal(hf[0], one + 1)
    with pytest.raises(PEFTError, match="returned a str"):
        on_hidden("x", lambda h: h)


BAD: dict[str, tuple[Any, str]] = {
    "no width": (lambda: SeriesAdapter(bottleneck=0), "bottleneck=0 was given"),
    "half a width": (lambda: ParallelAdapter(bottleneck=1.5), "bottleneck=1.5 was given"),
    "activation": (lambda: SeriesAdapter(activation="softplus"), "activation='softplus'.*relu"),
    "preset": (lambda: SeriesAdapter(preset="x"), "preset='x'.*houlsby"),
    "placement": (lambda: ParallelAdapter(placement=["layer"]), "placement=.*attention"),
    "nowhere": (lambda: SeriesAdapter(placement=[]), "placement=.*attention"),
    "one place": (lambda: SeriesAdapter(placement=["layer", "residual"]), "'layer' and 'residual' adapt one module"),
    "init": (lambda: SeriesAdapter(init="x"), "init='x'.*zero_up"),
    "dropout": (lambda: ParallelAdapter(dropout=1), "dropout=1"),
    "scale": (lambda: ParallelAdapter(scale=float("inf")), "scale=inf"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_hyper_parameters(case: str) -> None:
    make, message = BAD[case]
    with pytest.raises(PEFTError, match=message):
        make()


def test_places_that_cannot_be() -> None:
    with pytest.raises(PEFTError, match="without linear layers"):
        inject(build("llama")[0], ParallelAdapter(target_modules=["input_layernorm"]))
    with pytest.raises(PEFTError, match="adapter on both sides"):
        inject(build("mixtral")[0], SeriesAdapter(placement=["mlp", "mlp_input"]))
    with pytest.raises(PEFTError, match="there is no layer"):
        inject(build("llama")[0], SeriesAdapter(layers=[9]))
    with pytest.raises(PEFTError, match="No attention block"):
        find_blocks(ModelView(nn.Sequential(nn.Linear(2, 2))))
