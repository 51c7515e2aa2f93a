"""Methods that change weights, against HF PEFT (files both ways, outputs, gradients, merged weights) and formulas."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import build, outputs
from judges.hf_peft import METHODS, TARGETS, shift, trained
from modules import SteppedRegression, loader, trainer
from peft.optimizers import create_loraplus_optimizer
from resuming import straight_and_resumed
from torch import Tensor, nn

from lightning_peft import (
    BEFT,
    OFT,
    DoRA,
    LoHa,
    LoKr,
    LoRA,
    MiSS,
    PEFTError,
    PEFTMethod,
    PEFTStrategy,
    VeRA,
    inject,
    load_adapter,
    merge,
    save_adapter,
)

CASES = [(name, family) for name, (_, _, families) in METHODS.items() for family in families]


def base(family: str) -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = build(family.split()[0])
    return model.double(), {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


def loaded_by_judge(family: str, path: Path) -> nn.Module:
    judge = peft.PeftModel.from_pretrained(base(family)[0], path, is_trainable=True, autocast_adapter_dtype=False)
    return judge.double().eval()


@pytest.mark.parametrize(("name", "family"), CASES)
def test_our_files_in_peft(name: str, family: str, tmp_path: Path) -> None:
    model, inputs = base(family)
    plain = outputs(model, inputs)
    inject(model, METHODS[name][0](TARGETS[family]))
    shift(model)
    expected = outputs(model, inputs)
    assert (expected - plain).abs().max() > 1e-6
    save_adapter(model, tmp_path / "adapter")
    judge = loaded_by_judge(family, tmp_path / "adapter")
    assert (outputs(judge, inputs) - expected).abs().max() <= 1e-9

    expected.square().sum().backward()
    outputs(judge, inputs).square().sum().backward()
    theirs = sorted((p.grad for p in trained(judge) if p.grad is not None), key=_order)
    ours = sorted((p.grad for p in model.parameters() if p.grad is not None), key=_order)
    assert len(theirs) == len(ours) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.abs().max() > 0
        assert (a.flatten().sort()[0] - b.flatten().sort()[0]).abs().max() <= 1e-9 * b.abs().max().clamp(min=1.0)

    if "embeddings" not in family:  # peft merges an adapted embedding into the tied head as well
        merged = judge.merge_and_unload().state_dict()
        merge(model, unload=True)
        for key, tensor in model.state_dict().items():
            assert (tensor - merged[key]).abs().max() <= 1e-9, key


def _order(gradient: Tensor) -> tuple[int, float]:
    return gradient.numel(), round(float(gradient.norm()), 6)


@pytest.mark.parametrize(("name", "family"), CASES)
def test_their_files_in_ours(name: str, family: str, tmp_path: Path) -> None:
    model, inputs = base(family)
    judge = peft.get_peft_model(model, METHODS[name][1](TARGETS[family]), autocast_adapter_dtype=False).double().eval()
    shift(judge)
    judge.save_pretrained(tmp_path / "adapter")
    loaded, _ = base(family)
    plain = outputs(loaded, inputs)
    load_adapter(loaded, tmp_path / "adapter")
    assert (outputs(loaded, inputs) - outputs(judge, inputs)).abs().max() <= 1e-9
    assert (outputs(loaded, inputs) - plain).abs().max() > 1e-6


def one_layer(bias: bool = True) -> tuple[nn.Module, Tensor]:
    generator = torch.Generator().manual_seed(4)
    model = nn.Sequential(nn.Linear(6, 8, bias=bias)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model, torch.randn(5, 6, generator=generator, dtype=torch.float64)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {n.rsplit(".", 1)[-1]: p for n, p in model.named_parameters() if ".peft." in n}


@pytest.mark.parametrize("bias", [True, False])
def test_dora_is_its_equation(bias: bool) -> None:
    """Equation 5, and section 4.3: the norm is a constant to the gradient."""
    model, x = one_layer(bias)
    inject(model, DoRA(r=2, alpha=6))
    start = tensors(model)["lora_magnitude_vector"].clone()
    assert torch.allclose(start, model[0].weight.square().sum(1).sqrt(), rtol=1e-14, atol=0)
    shift(model)
    result = model(x)
    result.square().sum().backward()
    ours = {name: p.grad for name, p in tensors(model).items()}

    a, b, m = (
        tensors(model)[n].detach().clone().requires_grad_() for n in ("lora_A", "lora_B", "lora_magnitude_vector")
    )
    direction = model[0].weight.detach() + 3.0 * torch.einsum("or,ri->oi", b, a)
    weight = m[:, None] * direction / direction.detach().square().sum(1, keepdim=True).sqrt()
    expected = torch.einsum("bi,oi->bo", x, weight) + (model[0].bias if bias else 0)
    expected.square().sum().backward()
    assert (result - expected).abs().max() <= 1e-12
    for name, leaf in (("lora_A", a), ("lora_B", b), ("lora_magnitude_vector", m)):
        assert (ours[name] - leaf.grad).abs().max() <= 1e-9 * leaf.grad.abs().max(), name


def test_dora_of_a_row_of_zeros_and_of_a_weight_without_values() -> None:
    model, x = one_layer()
    with torch.no_grad():
        model[0].weight[2] = 0
    expected = model(x)
    inject(model, DoRA(r=2))
    assert torch.equal(model(x), expected)
    model(x).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in tensors(model).values())
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(6, 8))
    inject(empty, DoRA(r=2))
    adapter = empty[0].peft["default"]
    assert sum(p.numel() for p in adapter.parameters()) == 2 * (6 + 8) + 8
    with pytest.raises(PEFTError, match="Load the model's weights before injecting"):
        adapter.to_empty(device="cpu").reset_parameters()


def test_vera_is_its_equation() -> None:
    """Equation 2, with the corners of one pair of matrices for layers of different sizes."""
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 4)).double()
    x = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    inject(model, VeRA(r=7))
    shift(model)
    first, second = (layer.peft["default"] for layer in model)
    assert first.projections is second.projections
    big_a, big_b = first.projections.vera_A, first.projections.vera_B
    assert big_a.shape == (7, 9)
    assert big_b.shape == (9, 7)
    expected = x
    for layer, (d_in, d_out) in zip(model, ((6, 9), (9, 4)), strict=True):
        d, b = layer.peft["default"].vera_lambda_d, layer.peft["default"].vera_lambda_b
        update = torch.einsum("o,or,r,ri->oi", b, big_b[:d_out], d, big_a[:, :d_in])
        expected = torch.einsum("bi,oi->bo", expected, layer.weight + update) + layer.bias
    assert (model(x) - expected).abs().max() <= 1e-12
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 9 + 4 + 2 * 7


class TwoModels(SteppedRegression):
    """Holds two models of different sizes, each with files of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
        with torch.no_grad():
            for number, parameter in enumerate(self.other.parameters()):
                parameter.copy_(torch.sin(torch.arange(parameter.numel()) + number).view_as(parameter))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.net(x) + self.other(x)
        return result


def test_vera_in_several_plain_models(tmp_path: Path) -> None:
    trained, resumed = straight_and_resumed(tmp_path, TwoModels, VeRA(r=5), merge_on_train_end=False)
    x = torch.randn(3, 8)
    assert torch.equal(resumed(x), trained(x))
    assert not torch.equal(trained(x), TwoModels()(x))
    save_adapter(trained, tmp_path / "adapter")
    loaded = TwoModels()
    load_adapter(loaded, tmp_path / "adapter")
    assert torch.equal(loaded(x), trained(x))
    for name in ("net", "other"):
        judge = peft.PeftModel.from_pretrained(getattr(TwoModels(), name), tmp_path / "adapter" / name)
        assert torch.allclose(judge(x), getattr(trained, name)(x), atol=1e-6)


def test_vera_in_parts_of_one_model_is_saved_part_by_part(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": TwoModels().net, "b": TwoModels().other})
    for part in model.values():
        inject(part, VeRA(r=5))
    with pytest.raises(PEFTError, match=r"VeRA was injected into several parts of this ModuleDict.*one by one"):
        save_adapter(model, tmp_path / "adapter")
    for name, part in model.items():
        save_adapter(part, tmp_path / name)
        load_adapter(getattr(TwoModels(), {"a": "net", "b": "other"}[name]), tmp_path / name)


@pytest.mark.parametrize("options", [{"r": 0}, {"d_initial": 0.0}, {"dropout": 1.0}])
def test_vera_refuses(options: dict[str, Any]) -> None:
    with pytest.raises(PEFTError, match=f"VeRA: {next(iter(options))}="):
        VeRA(**options)


@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_lora_plus_trains_as_with_their_optimizer(kind: type[LoRA], tmp_path: Path) -> None:
    """Against HF PEFT's param groups for the same weights; without the magnitudes, which it speeds up too."""
    module = SteppedRegression()
    method = kind(r=2, target_modules=["net.0", "net.2"], loraplus_lr_ratio=16)
    run = trainer(tmp_path, PEFTStrategy(method, merge_on_train_end=False), max_steps=1)
    run.fit(module, loader())
    rates = {
        id(p): group["lr"] for optimizer in run.optimizers for group in optimizer.param_groups for p in group["params"]
    }
    judge = SteppedRegression()
    config = peft.LoraConfig(r=2, target_modules=["0", "2"], use_dora=kind is DoRA)
    theirs = peft.get_peft_model(judge.net, config)
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1.0, loraplus_lr_ratio=16)
    names = {id(p): n for n, p in theirs.named_parameters()}
    expected = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    compared = 0
    for name, parameter in module.net.named_parameters():
        host, _, leaf = name.partition(".peft.default.")
        if leaf and leaf != "lora_magnitude_vector":
            plain = rates[id(module.net.get_parameter(f"{host}.peft.default.lora_A"))]
            assert rates[id(parameter)] / plain == pytest.approx(
                expected[f"base_model.model.{host}.{leaf}.default.weight"]
            )
            compared += 1
        elif leaf:
            assert rates[id(parameter)] == plain
    assert compared == 4
    for ratio in (0, -1.0, float("nan")):
        with pytest.raises(PEFTError, match=f"{kind.__name__}: loraplus_lr_ratio="):
            kind(loraplus_lr_ratio=ratio)


@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_lora_fa_trains_all_but_a(kind: type[LoRA], tmp_path: Path) -> None:
    """The same as HF PEFT's adapter with A frozen by hand, gradients included; A is in the files."""
    model, inputs = base("llama")
    hosts = inject(model, kind(r=3, target_modules=["q_proj", "down_proj"], freeze_A=True))
    first = {h: model.get_submodule(h).peft["default"].lora_A.clone() for h in hosts}
    assert all(a.abs().max() > 0 for a in first.values())
    shift(model)
    save_adapter(model, tmp_path / "adapter")
    judge = loaded_by_judge("llama", tmp_path / "adapter")
    result = outputs(model, inputs)
    result.square().sum().backward()
    outputs(judge, inputs).square().sum().backward()
    assert (outputs(judge, inputs) - result).abs().max() <= 1e-9
    assert not any(n.endswith("lora_A") for n, p in model.named_parameters() if p.requires_grad)
    for host in hosts:
        wrapped = judge.get_submodule(f"base_model.model.{host}")
        gradient = model.get_submodule(host).peft["default"].lora_B.grad
        expected = wrapped.lora_B["default"].weight.grad
        assert (gradient - expected).abs().max() <= 1e-9 * expected.abs().max().clamp(min=1.0)
        assert torch.equal(wrapped.lora_A["default"].weight, first[host])
    for frozen in (True, False):
        again, _ = base("llama")
        inject(again, kind(r=3, target_modules=["q_proj", "down_proj"], freeze_A=frozen), seed=99)
        load_adapter(again, tmp_path / "adapter")
        assert torch.equal(outputs(again, inputs), result)


def test_lora_fa_refuses_embeddings() -> None:
    with pytest.raises(PEFTError, match=r"'model\.embed_tokens' cannot be adapted: .*A of an embedding starts at zero"):
        inject(base("llama")[0], LoRA(r=3, target_modules=["embed_tokens"], freeze_A=True))


def test_loha_is_its_equation() -> None:
    model, x = one_layer()
    inject(model, LoHa(r=2, alpha=6))
    assert torch.equal(model(x), one_layer()[0](x))
    shift(model)
    a1, b1, a2, b2 = (tensors(model)[f"hada_{w}"] for w in ("w1_a", "w1_b", "w2_a", "w2_b"))
    update = 3.0 * torch.einsum("or,ri,os,si->oi", a1, b1, a2, b2)
    expected = torch.einsum("bi,oi->bo", x, model[0].weight + update) + model[0].bias
    assert (model(x) - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("options", [{"r": 0}, {"alpha": 0.0}])
def test_loha_refuses(options: dict[str, Any]) -> None:
    with pytest.raises(PEFTError, match=f"LoHa: {next(iter(options))}="):
        LoHa(**options)


def test_lokr_is_its_equation() -> None:
    """The Kronecker product, element by element: 6 inputs are 2 times 3, or with a factor of 3 the reverse."""
    for options, first, second in (
        ({"r": 1}, (2, 2), (4, 3)),
        ({"r": 1, "decompose_factor": 3}, (2, 3), (4, 2)),
        ({"r": 9}, (2, 2), (4, 3)),
    ):
        model, x = one_layer()
        inject(model, LoKr(alpha=6, **options))
        assert torch.equal(model(x), one_layer()[0](x))
        shift(model)
        found = tensors(model)
        w1 = found["lokr_w1"]
        w2 = (
            found["lokr_w2"] if options["r"] == 9 else torch.einsum("kr,rn->kn", found["lokr_w2_a"], found["lokr_w2_b"])
        )
        assert (w1.shape, w2.shape) == (first, second)
        weight = model[0].weight.clone()
        for row in range(8):
            for column in range(6):
                change = w1[row // second[0], column // second[1]] * w2[row % second[0], column % second[1]]
                weight[row, column] += 6 / options["r"] * change
        expected = torch.einsum("bi,oi->bo", x, weight) + model[0].bias
        assert (model(x) - expected).abs().max() <= 1e-12


@pytest.mark.parametrize(
    "options", [{"r": 0}, {"r": True}, {"alpha": 0.0}, {"alpha": float("nan")}, {"decompose_factor": 0}]
)
def test_lokr_refuses(options: dict[str, Any]) -> None:
    with pytest.raises(PEFTError, match=f"LoKr: {next(iter(options))}="):
        LoKr(**options)


def test_damaged_lokr_files_are_refused(tmp_path: Path) -> None:
    """A rank that makes other tensors than the file holds; patterns, which have no place here."""
    options: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    for change, message in (
        ({"r": 9}, r"has lokr_w1, lokr_w2_a, lokr_w2_b alone; lokr_w1, lokr_w2 were expected"),
        ({"decompose_both": "yes"}, "decompose_both='yes'; bool was expected"),
        ({"decompose_factor": 0}, "decompose_factor=0 was given"),
        ({"rank_pattern": {"v_proj": 1}}, r"rank_pattern=.*which LoKr has not here"),
    ):
        peft.get_peft_model(base("llama")[0], peft.LoKrConfig(**options)).save_pretrained(tmp_path / "adapter")
        file = tmp_path / "adapter" / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
        with pytest.raises(PEFTError, match=message):
            load_adapter(base("llama")[0], tmp_path / "adapter")


def test_oft_is_its_equation() -> None:
    """Cayley's transform, of whole matrices; the series comes to it with more terms."""
    for options in ({"use_cayley_neumann": False}, {"num_cayley_neumann_terms": 40}):
        model, x = one_layer()
        inject(model, OFT(block_size=3, **options))
        assert torch.equal(model(x), one_layer()[0](x))
        shift(model)
        q = torch.zeros(6, 6, dtype=torch.float64)
        for block, numbers in enumerate(tensors(model)["oft_R"].detach()):
            for (row, column), number in zip(((0, 1), (0, 2), (1, 2)), numbers, strict=True):
                q[3 * block + row, 3 * block + column], q[3 * block + column, 3 * block + row] = number, -number
        identity = torch.eye(6, dtype=torch.float64)
        rotation = (identity - q) @ (identity + q).inverse()
        rotation = rotation if "use_cayley_neumann" in options else rotation.T
        assert (rotation @ rotation.T - identity).abs().max() <= 1e-12
        weight = model[0].weight @ rotation.T
        assert (model(x) - x @ weight.T - model[0].bias).abs().max() <= 1e-12
        merge(model, unload=True)
        assert (model[0].weight - weight).abs().max() <= 1e-12


@pytest.mark.parametrize(
    "options", [{"block_size": 1}, {"r": -1}, {"num_cayley_neumann_terms": 3}, {"num_cayley_neumann_terms": 10**9}]
)
def test_oft_refuses(options: dict[str, Any]) -> None:
    with pytest.raises(PEFTError, match=f"OFT: {next(iter(options))}="):
        OFT(**options)


def test_miss_is_its_equation() -> None:
    """Shards of 4 features, of which the last one is filled up: 6 inputs; S of 8 columns, or of 2, repeated."""
    for options, columns in (({}, 8), ({"mini_r": 2}, 2)):
        model, x = one_layer()
        inject(model, MiSS(r=4, **options))
        assert torch.equal(model(x), one_layer()[0](x))
        shift(model)
        shared = tensors(model)["miss_block"]
        assert shared.shape == (4, columns)
        weight = model[0].weight.detach().clone()
        for row in range(8):
            for column in range(6):
                weight[row, column] += shared[column % 4, row % columns].item()
        assert (model(x) - x @ weight.T - model[0].bias).abs().max() <= 1e-12


@pytest.mark.parametrize("options", [{"r": 0}, {"mini_r": 0}, {"mini_r": True}, {"dropout": 1.0}])
def test_miss_refuses(options: dict[str, Any]) -> None:
    with pytest.raises(PEFTError, match=f"MiSS: {next(iter(options))}="):
        MiSS(**options)


def test_miss_leaves_out_what_it_does_not_fit() -> None:
    model = nn.Sequential(nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 4), nn.Linear(4, 8))
    with pytest.warns(UserWarning, match="leaves out") as caught:
        assert inject(model, MiSS(r=8, mini_r=4)) == ["2"]
    said = " ".join(str(warning.message) for warning in caught)
    assert "'0': it has 9 outputs, which mini_r=4 does not divide" in said
    assert "'3': it has 4 inputs, which make no shard of r=8" in said


def test_a_miss_that_depends_on_the_weight_is_refused(tmp_path: Path) -> None:
    config = peft.MissConfig(r=4, init_weights="bat", target_modules=["q_proj"])
    peft.get_peft_model(base("llama")[0], config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(PEFTError, match="uses init_weights='bat', which MiSS has not here"):
        load_adapter(base("llama")[0], tmp_path / "adapter")


def test_beft_beside_layers_without_biases(tmp_path: Path) -> None:
    """Its default are the value projections; HF PEFT reads them, but does not merge them."""
    model, inputs = base("llama")
    assert [host.rpartition(".")[2] for host in inject(model, BEFT())] == ["v_proj"] * 2
    shift(model)
    expected = outputs(model, inputs)
    save_adapter(model, tmp_path / "adapter")
    with pytest.warns(UserWarning, match="no bias term"):
        judge = loaded_by_judge("llama", tmp_path / "adapter")
    assert (outputs(judge, inputs) - expected).abs().max() <= 1e-9
    merge(model, unload=True)
    assert (outputs(model, inputs) - expected).abs().max() <= 1e-9


def test_beft_refuses_exclusions_from_what_was_not_named() -> None:
    with pytest.raises(PEFTError, match="BEFT: exclude_modules was given without target_modules"):
        BEFT(exclude_modules=["q_proj"])


@pytest.mark.parametrize("method", [LoHa(r=2), LoKr(r=2), OFT(block_size=4), MiSS(r=4), BEFT()])
def test_what_hf_peft_has_not_for_conv1d_is_written_in_our_format(method: PEFTMethod, tmp_path: Path) -> None:
    model, inputs = base("gpt2")
    inject(model, method)
    shift(model)
    expected = outputs(model, inputs)
    save_adapter(model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LIGHTNING_PEFT"
    fresh, _ = base("gpt2")
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(outputs(fresh, inputs), expected)


def test_oft_says_where_blocks_are_of_another_size() -> None:
    with pytest.warns(UserWarning, match=r"block_size=4 does not divide .* other sizes in '2' \(5\)"):
        inject(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(10, 2)), OFT(block_size=4))
    with pytest.raises(PEFTError, match="'0' cannot be adapted: its 37 inputs make no blocks"):
        inject(nn.Sequential(nn.Linear(37, 8)), OFT(block_size=8, target_modules=["0"]))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"oft_block_size": None}, "has no oft_block_size"),
        ({"peft_version": "0.17.1"}, "before HF PEFT's release 0.18"),
        ({"peft_version": None}, "before HF PEFT's release 0.18"),
        ({"coft": True}, "uses coft=True"),
    ],
)
def test_files_of_another_oft_are_refused(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = peft.OFTConfig(oft_block_size=8, target_modules=["q_proj"])
    peft.get_peft_model(base("llama")[0], config).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    written = {**json.loads(file.read_text()), **keys}
    file.write_text(json.dumps({key: value for key, value in written.items() if value is not None}))
    with pytest.raises(PEFTError, match=message):
        load_adapter(base("llama")[0], tmp_path / "adapter")


def test_loha_files_with_patterns_are_refused(tmp_path: Path) -> None:
    config = peft.LoHaConfig(r=3, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2})
    peft.get_peft_model(base("llama")[0], config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(PEFTError, match=r"rank_pattern=.*cannot be read"):
        load_adapter(base("llama")[0], tmp_path / "adapter")
