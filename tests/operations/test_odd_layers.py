"""Adapters beside layers that do not compute the plain function of their weight: trained, kept, and never merged."""

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import randomise
from modules import Regression, loader, trainer
from odd_layers import LAYERS, Activated, WithBias, given, made
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations

from lightning_peft import (
    BEFT,
    IA3,
    OFT,
    AdaLoRA,
    BitFit,
    DoRA,
    FullFinetuning,
    LoHa,
    LoKr,
    LoRA,
    MiSS,
    PEFTError,
    PEFTMethod,
    PEFTStrategy,
    SeriesAdapter,
    VeRA,
    inject,
    load_adapter,
    merge,
    save_adapter,
    unmerge,
)
from lightning_peft.core.view import ModelView
from lightning_peft.operations.merge import is_merged
from lightning_peft.operations.mergeable import refuse_unloading

METHODS: dict[str, PEFTMethod] = {
    "lora": LoRA(r=2, target_modules="layer"),
    "pissa": LoRA(r=2, target_modules="layer", init="pissa"),
    "dora": DoRA(r=2, target_modules="layer"),
    "adalora": AdaLoRA(init_r=2, target_r=1, target_modules="layer"),
    "loha": LoHa(r=2, target_modules="layer"),
    "lokr": LoKr(r=2, target_modules="layer"),
    "beft": BEFT(target_modules="layer"),
    "miss": MiSS(r=4, target_modules="layer"),
    "oft": OFT(block_size=4, target_modules="layer"),
    "vera": VeRA(r=2, target_modules="layer"),
    "ia3": IA3(target_modules="layer"),
    "ia3 of the input": IA3(target_modules="layer", feedforward_modules="layer"),
}
LINEAR = [name for name in LAYERS if isinstance(made(name), nn.Linear) and LAYERS[name][0] != "neither"]
OTHERS = [name for name in LAYERS if name not in LINEAR and LAYERS[name][0] != "neither"]
CELLS = [*((m, name) for m in METHODS for name in LINEAR), *(("lora", name) for name in OTHERS)]


@pytest.mark.filterwarnings("ignore:.*cannot be merged and will stay attached")
@pytest.mark.parametrize(("method", "name"), CELLS)
def test_a_merge_is_exact_or_is_not_made(method: str, name: str) -> None:
    kind, model, x = LAYERS[name][0], nn.ModuleDict({"layer": made(name)}).eval(), given(name)
    layer, base = model["layer"], model["layer"](x)
    if method == "dora" and kind == "beside":
        with pytest.raises(PEFTError, match=r"'layer' cannot be adapted: .* no function of the norms"):
            inject(model, METHODS[method])
        return
    inject(model, METHODS[method])
    assert torch.allclose(layer(x), base, atol=1e-6)
    randomise(model)
    trained = layer(x)
    assert not torch.allclose(trained, base, atol=1e-4)
    assert merge(model).merged == (kind == "plain")
    assert torch.allclose(layer(x), trained, atol=1e-6)
    if kind == "plain":
        merge(model, unload=True)
    else:
        with pytest.raises(PEFTError, match=r"'layer' cannot be merged \(it does not compute the plain function"):
            merge(model, unload=True)
    assert torch.allclose(layer(x), trained, atol=1e-6)


def test_a_bias_that_a_layer_adds_elsewhere_is_not_merged() -> None:
    model = nn.Sequential(Activated(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    with pytest.warns(UserWarning, match=r"adapters of '0' \(Activated\) cannot be merged"):
        inject(model, BitFit(create_missing=True))
    randomise(model)
    x = torch.randn(3, 8)
    trained = model(x)
    report = merge(model)
    assert (report.merged, report.kept) == (1, ("0",))
    assert torch.allclose(model(x), trained, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in LAYERS if LAYERS[name][0] == "neither"])
def test_what_nothing_can_be_added_to_is_refused_by_name_and_left_out_by_presets(name: str) -> None:
    model = nn.ModuleDict({"layer": made(name), "plain": nn.Linear(8, 8)})
    with pytest.raises(PEFTError, match=r"'layer' cannot be adapted: .*Exclude it"):
        inject(model, LoRA(r=2, target_modules=["layer", "plain"]))
    if isinstance(model["layer"], nn.Linear):
        with pytest.warns(UserWarning, match="target_modules='all-linear' leaves out 'layer': "):
            assert inject(model, LoRA(r=2)) == ["plain"]


def test_what_nothing_can_be_added_to_is_refused_where_structure_finds_it() -> None:
    model = nn.Sequential(WithBias(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    with pytest.raises(PEFTError, match="'0' cannot be adapted: what a WithBias makes of its input"):
        inject(model, BitFit(create_missing=True))


def test_empty_layers_are_left_out() -> None:
    """As projections of features of which there are none."""
    model = nn.ModuleDict({"none": nn.Linear(0, 4), "some": nn.Linear(4, 4)})
    with pytest.warns(UserWarning, match="leaves out 'none': its weight is empty"):
        assert inject(model, LoRA(r=2)) == ["some"]


def packed(layer: nn.Linear) -> nn.Linear:
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    return layer


def expanded(layer: nn.Linear) -> nn.Linear:
    layer.weight = nn.Parameter(layer.weight.detach()[:, :1].expand(8, 8), requires_grad=False)
    return layer


UNMERGED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "expanded": (lambda: expanded(nn.Linear(8, 8)), "elements of its weight lie in one place"),
    "grouped": (lambda: nn.Conv1d(8, 8, 3, groups=2), "it has several groups"),
    "complex": (lambda: nn.Linear(8, 8, dtype=torch.cfloat), "its weight is complex"),
    "quantised": (lambda: packed(nn.Linear(8, 8)), "its weight is quantised"),
    "activated": (lambda: Activated(8, 8), "it does not compute the plain function of its weight"),
}


@pytest.mark.parametrize("name", UNMERGED)
def test_why_an_adapter_stays_attached_is_said_from_the_start(name: str) -> None:
    make, reason = UNMERGED[name]
    model = nn.Sequential(make(), nn.Linear(8, 8))
    with pytest.warns(UserWarning, match=rf"the adapters of '0' \(\w+\) cannot be merged .* Reason: {reason}"):
        inject(model, LoRA(r=2, target_modules=["0", "1"]))
    randomise(model)
    with pytest.raises(PEFTError, match=rf"adapter of '0' cannot be merged \({reason}"):
        merge(model, unload=True)
    with pytest.raises(PEFTError, match=rf"LoRAAdapter cannot be merged into a weight of '0' \({reason}"):
        refuse_unloading(ModelView(model))
    assert merge(model).kept == ("0",)


def test_a_weight_whose_elements_lie_in_one_place_is_not_written_to() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(3, 8)
    model[0].weight = nn.Parameter(model[0].weight.detach()[:, :1].expand(8, 8))
    with pytest.warns(UserWarning, match="Reason: elements of its weight lie in one place"):
        inject(model, LoRA(r=2))
    randomise(model)
    trained = model(x)
    assert merge(model).kept == ("0",)
    assert torch.allclose(model(x), trained, atol=1e-5)


def scripted(kind: str) -> nn.Module:
    torch.manual_seed(0)
    layers, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.zeros(1, 8)
    script: Any = torch.jit.trace(layers, x) if kind == "traced" else torch.jit.script(layers)
    if kind == "loaded":
        file = io.BytesIO()
        torch.jit.save(script, file)
        script = torch.jit.load(io.BytesIO(file.getvalue()))
    return nn.ModuleDict({"script": script, "plain": nn.Linear(8, 8)})


@pytest.mark.parametrize("kind", ["scripted", "traced", "loaded"])
def test_torchscript_is_left_alone(tmp_path: Path, kind: str) -> None:
    model, x = scripted(kind), torch.randn(3, 8)
    assert inject(model, LoRA(r=2)) == ["plain"]
    assert not any(p.requires_grad for p in model["script"].parameters())
    randomise(model)
    trained = model["plain"](model["script"](x))
    save_adapter(model, tmp_path / "adapter")
    merge(model, unload=True)
    assert torch.allclose(model["plain"](model["script"](x)), trained, atol=1e-5)
    again = scripted(kind)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again["plain"](again["script"](x)), trained)
    whole = scripted(kind)
    inject(whole, FullFinetuning())
    assert all(p.requires_grad for p in whole.parameters())


@pytest.mark.parametrize("kind", ["scripted", "traced", "loaded"])
@pytest.mark.parametrize("method", [LoRA(r=2, target_modules=["script.0"]), SeriesAdapter(target_modules=["script"])])
def test_torchscript_is_refused_by_name(kind: str, method: PEFTMethod) -> None:
    with pytest.raises(PEFTError, match=r"matches only modules that cannot be adapted \(\w*(Script|Traced)Module\)\.$"):
        inject(scripted(kind), method)


def test_a_weight_that_is_parametrized_after_the_injection_is_not_merged() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(3, 8)
    inject(model, LoRA(r=2))
    randomise(model)
    parametrizations.weight_norm(model[0])
    trained = model(x)
    with pytest.warns(UserWarning, match="'0' cannot be merged and stays attached: it does not compute the plain"):
        report = merge(model)
    assert (report.merged, report.kept) == (1, ("0",))
    assert torch.allclose(model(x), trained, atol=1e-5)


@pytest.mark.parametrize("kind", ["prepended", "deleted", "appended"])
def test_an_adapter_behind_a_hook_of_others_is_not_merged(kind: str) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(3, 8)
    inject(model, LoRA(r=2))
    randomise(model)
    if kind == "deleted":
        model[0]._forward_hooks.clear()
    else:
        model[0].register_forward_hook(lambda module, args, output: output.relu(), prepend=kind == "prepended")
    trained = model(x)
    if kind == "appended":
        assert merge(model).merged == 2
    else:
        with pytest.raises(PEFTError, match="a forward hook of others runs between the module and the adapter, or"):
            merge(model, unload=True)
        with pytest.warns(UserWarning, match="'0' cannot be merged and stays attached: a forward hook of others"):
            assert merge(model).kept == ("0",)
        unmerge(model)
        assert torch.equal(model(x), trained)
        with pytest.warns(UserWarning, match="stays attached"):
            merge(model)
    assert torch.allclose(model(x), trained, atol=1e-5)


class Rectified(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.Linear.forward(self, x).relu()


def replaced(forward: Any) -> Any:
    return lambda layer: layer.__dict__.update(forward=partial(forward, layer))


INPUT = IA3(target_modules=["0"], feedforward_modules=["0"])
CHANGES: dict[str, Any] = {
    "forward": replaced(Rectified.forward),
    "the same forward": replaced(nn.Linear.forward),
    "class": lambda layer: setattr(layer, "__class__", Rectified),
    "hook before": lambda layer: layer.register_forward_pre_hook(lambda module, args: (args[0].relu(),)),
    "first hook before": lambda layer: layer.register_forward_pre_hook(lambda m, args: (args[0].relu(),), prepend=True),
    "no hooks before": lambda layer: layer._forward_pre_hooks.clear(),
    "hook of all": lambda layer: register_module_forward_hook(lambda m, args, out: out.relu() if m is layer else None),
}


@pytest.mark.parametrize("method", [LoRA(r=2, target_modules=["0"]), INPUT, IA3(target_modules=["0"])])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_done_to_a_layer_after_the_injection_stays_right_or_keeps_the_adapter(method: Any, change: str) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(3, 8)
    inject(model, method)
    randomise(model)
    handle = CHANGES[change](model[0])
    trained = model(x)
    late = ("hook before", "no hooks before") if method is INPUT else ()
    if change in ("forward", "class", "hook of all", *late):
        with pytest.warns(UserWarning, match="'0' cannot be merged and stays attached"):
            assert not merge(model).merged
        with pytest.raises(PEFTError, match=r"a forward hook of others runs between|does not compute the plain"):
            merge(model, unload=True)
    else:
        assert merge(model).merged
    assert torch.allclose(model(x), trained, atol=1e-5)
    if change == "hook of all":
        handle.remove()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", [LoRA(r=2), INPUT])
def test_torchs_dynamic_quantisation(method: PEFTMethod) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(3, 8)
    inject(model, method)
    randomise(model)
    with pytest.raises(PEFTError, match=r"A layer with an adapter was replaced.*Merge.*merge\(model\)"):
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear})(x)
    merge(model)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})(x)
    merge(model, unload=True)
    assert torch.equal(quantised, torch.ao.quantization.quantize_dynamic(model, {nn.Linear})(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_made_of_a_plain_model() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(3, 8)
    inject(model, LoRA(r=2))
    randomise(model)
    for merged in (False, True):
        if merged:
            merge(model)
            assert torch.equal(torch.jit.trace(model, x)(x), model(x))
        with pytest.raises(PEFTError, match=r"TorchScript.*unload=True\) first"):
            torch.jit.script(model)
    merge(model, unload=True)
    assert torch.equal(torch.jit.script(model)(x), model(x))


class Normed(Regression):
    def build(self) -> nn.Module:
        layers: Any = super().build()
        layers[0] = parametrizations.weight_norm(layers[0])
        return nn.Sequential(*layers[:2], Activated(16, 16), *layers[2:])


def test_a_run_says_at_its_start_what_it_will_not_merge_and_ends_well(tmp_path: Path) -> None:
    module, x = Normed(), torch.randn(3, 8)
    base = module(x)
    with pytest.warns(UserWarning, match=r"'net\.0' \(ParametrizedLinear\), 'net\.2' \(Activated\) cannot be merged"):
        trainer(tmp_path).fit(module, loader())
    assert is_merged(module)
    assert not torch.allclose(module(x), base)
    plain = [name for name, p in Normed().named_parameters() if not torch.equal(p, module.get_parameter(name))]
    assert plain == ["net.3.weight"]


def test_a_run_that_is_to_leave_a_plain_module_says_at_its_start_what_to_leave_out(tmp_path: Path) -> None:
    module, steps = Normed(), []
    module.training_step = lambda *args: steps.append(args)
    with pytest.raises(PEFTError, match=r"cannot be merged into .*exclude_modules=\['net\.0', 'net\.2'\]"):
        trainer(tmp_path, PEFTStrategy(LoRA(r=2), merge_on_train_end="unload")).fit(module, loader())
    assert not steps
    plain = Normed()
    method = LoRA(r=2, exclude_modules=["net.0", "net.2"])
    trainer(tmp_path, PEFTStrategy(method, merge_on_train_end="unload")).fit(plain, loader())
    assert plain.state_dict().keys() == Normed().state_dict().keys()
    assert not torch.equal(plain.net[3].weight, Normed().net[3].weight)
