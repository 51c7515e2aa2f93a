"""PiSSA and OLoRA, against HF PEFT, which takes the start out of the weight, and against their definitions."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import build, outputs
from modules import SteppedRegression, assert_same
from resuming import straight_and_resumed
from strangers import unsealed
from torch import nn

from lightning_peft import DoRA, LoRA, PEFTError, inject, load_adapter, merge, save_adapter
from lightning_peft.cli import main
from lightning_peft.core.registry import own_registry

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"], "t5": ["q", "wo"]}
INITS = ["pissa", "olora"]


def theirs(family: str, **options: Any) -> nn.Module:
    """HF PEFT's model, which decomposes in float32 alone."""
    config = peft.LoraConfig(r=3, lora_alpha=12, target_modules=TARGETS[family], **options)
    return peft.get_peft_model(build(family)[0], config).eval()


def layers(judge: nn.Module) -> dict[str, Any]:
    return {n.removeprefix("base_model.model."): m for n, m in judge.named_modules() if hasattr(m, "base_layer")}


def ours(family: str, init: str, **options: Any) -> nn.Module:
    model = build(family)[0]
    inject(model, LoRA(r=3, alpha=12, target_modules=TARGETS[family], init=init, **options))
    return model


def adapter_of(model: nn.Module, host: str) -> Any:
    return model.get_submodule(host).peft["default"]


# Theirs decomposes the weight of gpt2's Conv1D transposed by OLoRA, and fails.
@pytest.mark.parametrize(
    ("init", "family"), [("pissa", "llama"), ("pissa", "gpt2"), ("pissa", "t5"), ("olora", "llama"), ("olora", "t5")]
)
def test_the_start_is_theirs(init: str, family: str) -> None:
    """Up to the sign of singular vectors. They take it out of the weight, we leave that as it is."""
    judge, model = theirs(family, init_lora_weights=init), ours(family, init)
    for host, layer in layers(judge).items():
        found = adapter_of(model, host)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        signs = torch.sign((found.lora_A * a).sum(dim=1))
        assert (found.lora_A - signs[:, None] * a).abs().max() <= 1e-5
        assert (found.lora_B - signs * b).abs().max() <= 1e-5
        assert torch.equal(model.get_submodule(host).weight, build(family)[0].get_submodule(host).weight)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}])
def test_trained_as_theirs_and_written_as_theirs(init: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Outputs and gradients in float64 after the same steps; files that any reader applies to the weight as it was."""
    judge, model = theirs("llama", init_lora_weights=init, **options), ours("llama", init, **options)
    judge.peft_config["default"].init_lora_weights = True
    judge.save_pretrained(tmp_path / "start")
    judge.peft_config["default"].init_lora_weights = init
    judge, model, inputs = judge.double(), model.double(), build("llama")[1]
    plain = build("llama")[0].double()
    for host, layer in layers(judge).items():
        a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        # The start in float64, so that only this package's way of measuring from it differs.
        layer.base_layer.weight.data = plain.get_submodule(host).weight - layer.scaling["default"] * b @ a
        found = adapter_of(model, host)
        for target, value in ((found.lora_A, a), (found.start_A, a), (found.lora_B, b), (found.minus_start_B, -b)):
            target.data.copy_(value)
    assert torch.equal(outputs(model, inputs), outputs(plain, inputs))
    for step in range(3):
        for part in (judge, model):
            optimizer = torch.optim.SGD([p for p in part.parameters() if p.requires_grad], lr=0.1)
            optimizer.zero_grad()
            outputs(part, inputs).square().sum().backward()
            if step < 2:
                optimizer.step()
    expected = outputs(judge, inputs)
    assert (outputs(model, inputs) - expected).abs().max() <= 1e-9
    assert (expected - outputs(plain, inputs)).abs().max() > 1e-2
    for host, layer in layers(judge).items():
        for which in ("lora_A", "lora_B"):
            gradient = getattr(layer, which)["default"].weight.grad
            assert (getattr(adapter_of(model, host), which).grad - gradient).abs().max() <= 1e-9 * gradient.abs().max()

    save_adapter(model, tmp_path / "ours")
    judge.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    for folder in ("ours", "theirs"):
        read = peft.PeftModel.from_pretrained(
            build("llama")[0].double(), tmp_path / folder, autocast_adapter_dtype=False
        )
        assert (outputs(read.double().eval(), inputs) - expected).abs().max() <= 1e-9, folder
        again = build("llama")[0].double()
        load_adapter(again, tmp_path / folder)
        assert (outputs(again, inputs) - expected).abs().max() <= 1e-9, folder
    sizes = [peft.utils.load_peft_weights(str(tmp_path / folder), device="cpu") for folder in ("ours", "theirs")]
    assert {n: t.shape for n, t in sizes[0].items()} == {n: t.shape for n, t in sizes[1].items()}
    merge(model, unload=True)
    assert (outputs(model, inputs) - expected).abs().max() <= 1e-9


def trained(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"freeze_A": True},
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"down_proj": 7.3}, "use_rslora": True},
    ],
)
def test_our_files_bring_the_method_back(options: dict[str, Any], tmp_path: Path) -> None:
    """Bit for bit, with the start; without the file beside them they are a plain LoRA of twice the rank."""
    model, inputs = trained(ours("llama", "pissa", **options)), build("llama")[1]
    expected = outputs(model, inputs)
    save_adapter(model, tmp_path / "adapter")
    again = build("llama")[0]
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(outputs(again, inputs), expected)
    method = own_registry(again).methods["default"][0]  # type: ignore[union-attr]
    assert (method.init, method.r, method.alpha) == ("pissa", 3, 12)
    found = adapter_of(again, "model.layers.0.self_attn.v_proj")
    original = adapter_of(model, "model.layers.0.self_attn.v_proj")
    assert torch.equal(found.start_A, original.start_A)
    assert torch.equal(found.minus_start_B, original.minus_start_B)
    save_adapter(again, tmp_path / "adapter")
    # Into an adapter that is there.
    other = ours("llama", "pissa", **options)
    load_adapter(other, tmp_path / "adapter")
    assert torch.equal(outputs(other, inputs), expected)

    (unsealed(tmp_path / "adapter") / "lightning_peft.json").unlink()
    plain = build("llama")[0]
    load_adapter(plain, tmp_path / "adapter")
    assert (outputs(plain, inputs) - expected).abs().max() <= 1e-5
    assert own_registry(plain).methods["default"][0].r == 6  # type: ignore[union-attr]


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
@pytest.mark.parametrize("kind", ["directory", "file"])
def test_a_resumed_run_ends_bit_for_bit_as_a_straight_one(init: str, kind: str, tmp_path: Path) -> None:
    method = LoRA(r=2, init=init)
    straight, resumed = straight_and_resumed(tmp_path, SteppedRegression, method, file=kind == "file")
    assert_same(dict(straight.state_dict()), dict(resumed.state_dict()))


def test_a_fast_decomposition_finds_the_largest_singular_values() -> None:
    """Eckart and Young: no other product of this rank is nearer to the weight."""
    model = nn.Sequential(nn.Linear(40, 30)).double()
    s = torch.linalg.svdvals(model[0].weight)
    before = torch.get_rng_state()
    errors = {}
    for init in ("pissa", "pissa_niter_1", "pissa_niter_30"):
        twin = nn.Sequential(nn.Linear(40, 30)).double()
        twin.load_state_dict(model.state_dict())
        state = torch.get_rng_state()
        inject(twin, LoRA(r=5, alpha=10, init=init), seed=3)
        assert torch.equal(torch.get_rng_state(), state)
        adapter = twin[0].peft["default"]
        errors[init] = (twin[0].weight - 2 * adapter.lora_B @ adapter.lora_A).square().sum().item()
    best = s[5:].square().sum().item()
    assert errors["pissa"] == pytest.approx(best, rel=1e-12)
    assert errors["pissa_niter_30"] == pytest.approx(best, rel=1e-3)
    assert best < errors["pissa_niter_30"] < errors["pissa_niter_1"]
    assert not torch.equal(before, torch.get_rng_state())


def test_in_half_precision_a_small_change_is_not_lost() -> None:
    """The change is a hundredth of what it is measured from: as a difference of two products it would be rounding."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).bfloat16()
    x = torch.randn(32, 64).bfloat16()
    inject(model, LoRA(r=8, alpha=8, init="pissa"))
    adapter = model[0].peft["default"]
    with torch.no_grad():
        adapter.lora_B.add_(torch.randn_like(adapter.lora_B) * 1e-3)
        change = adapter(model[0], (x,), {}, torch.zeros(32, 64, dtype=torch.bfloat16)).float()
        exact = x.double() @ (adapter.lora_B.double() + adapter.minus_start_B.double()).mm(adapter.lora_A.double()).T
    assert (change - exact).norm() <= 0.02 * exact.norm()


@pytest.mark.parametrize("init", ["pizza", "pissa_niter_", "pissa_niter_x", "olora_2", 3])
def test_unknown_starts(init: Any) -> None:
    with pytest.raises(
        PEFTError, match=r"LoRA: init=.*it is 'kaiming', 'gaussian', 'pissa', 'pissa_niter_N' or 'olora'"
    ):
        LoRA(init=init)


def test_refused_hosts() -> None:
    with pytest.raises(PEFTError, match=r"DoRA: init='pissa' was given; it is 'kaiming', 'gaussian'\."):
        DoRA(init="pissa")
    with pytest.raises(PEFTError, match="'embed_tokens' matches only modules that cannot be adapted"):
        inject(build("llama")[0], LoRA(r=2, init="pissa", target_modules=["embed_tokens"]))
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(6, 8))
    inject(empty, LoRA(r=2, init="olora"))
    with pytest.raises(PEFTError, match="Load the model's weights before injecting"):
        empty[0].peft["default"].to_empty(device="cpu").reset_parameters()


def test_damaged_files(tmp_path: Path) -> None:
    def written(**change: Any) -> Path:
        save_adapter(ours("llama", "pissa"), tmp_path / "adapter")
        for file, key in (("adapter_config.json", "config"), ("lightning_peft.json", "marker")):
            place = unsealed(tmp_path / "adapter") / file
            place.write_text(json.dumps({**json.loads(place.read_text()), **change.get(key, {})}))
        return tmp_path / "adapter"

    for change, message in (
        ({"config": {"r": 5}}, "rank 5 of its configuration"),
        ({"marker": {"lightning_peft": {"init": "pizza"}}}, "type 'LORA'"),
        ({"marker": {"lightning_peft": 3}}, "type 'LORA'"),
    ):
        with pytest.raises(PEFTError, match=message):
            load_adapter(build("llama")[0], written(**change))


def test_a_start_beside_a_rank_that_has_no_half(tmp_path: Path) -> None:
    save_adapter(ours("llama", "kaiming"), tmp_path / "adapter")
    place = unsealed(tmp_path / "adapter") / "lightning_peft.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "lightning_peft": {"init": "pissa"}}))
    with pytest.raises(PEFTError, match="the rank 3; an even one was expected"):
        load_adapter(build("llama")[0], tmp_path / "adapter")


def test_exported_for_servers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, inputs = trained(ours("llama", "pissa")), build("llama")[1]
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(SystemExit) as stop:
        main(["export", str(tmp_path / "adapter"), "--out", str(tmp_path / "served")])
    assert stop.value.code == 0, capsys.readouterr()
    read = peft.PeftModel.from_pretrained(build("llama")[0], tmp_path / "served").eval()
    assert (outputs(read, inputs) - outputs(model, inputs)).abs().max() <= 1e-5
