"""Injection changes nothing but what it says, and ejection gives the model back as it was."""

import copy
import pickle
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import FAMILIES, build, outputs, randomise
from torch import nn
from unchanged import assert_unchanged, snapshot

from lightning_peft import LoRA, PEFTError, combine, eject, inject, load_adapter, merge, save_adapter, set_adapter


@pytest.mark.parametrize("family", FAMILIES)
def test_start_is_the_identity_and_ejection_restores(family: str) -> None:
    model, inputs = build(family)
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    before, expected, stream = snapshot(model), outputs(model, inputs), torch.get_rng_state()
    hosts = inject(model, LoRA(r=2))
    assert hosts
    assert torch.equal(torch.get_rng_state(), stream)
    assert torch.equal(outputs(model, inputs), expected)
    assert before["state"].keys() <= model.state_dict().keys()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{host}.peft.default.lora_{letter}" for host in hosts for letter in "AB"}
    randomise(model)
    assert not torch.equal(outputs(model, inputs), expected)
    eject(model)
    assert torch.equal(outputs(model, inputs), expected)
    assert_unchanged(model, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_leaves_the_head_out(family: str) -> None:
    model, _ = build(family)
    heads = {"lm_head", "classifier", "score"}
    assert not {host.rsplit(".", 1)[-1] for host in inject(model, LoRA(r=2))} & heads


def test_the_formula_in_float64() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 5).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    w, b = layer.weight.detach().clone(), layer.bias.detach().clone()
    model = nn.Sequential(layer)
    inject(model, LoRA(r=3, alpha=7))
    a_matrix, b_matrix = torch.randn(3, 6, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        parameters["0.peft.default.lora_A"].copy_(a_matrix)
        parameters["0.peft.default.lora_B"].copy_(b_matrix)
    expected = torch.einsum("ni,oi->no", x, w + 7 / 3 * torch.einsum("or,ri->oi", b_matrix, a_matrix)) + b
    assert (model(x) - expected).abs().max() < 1e-12


def test_dropout_acts_on_the_adapter_alone_and_in_training_alone() -> None:
    model, x = nn.Sequential(nn.Linear(64, 8)), torch.ones(1, 64)
    base = model(x)
    inject(model, LoRA(r=1, alpha=1, dropout=0.5))
    parameters = dict(model.named_parameters())
    nn.init.ones_(parameters["0.peft.default.lora_A"])
    nn.init.ones_(parameters["0.peft.default.lora_B"])
    model.train()
    draws = torch.stack([(model(x) - base)[0, 0] for _ in range(400)])
    assert draws.std() > 4
    assert abs(draws.mean() - 64) < 2
    model.eval()
    assert torch.allclose(model(x) - base, torch.full((1, 8), 64.0), atol=1e-4)


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    def values(seed: int, targets: list[str]) -> torch.Tensor:
        torch.manual_seed(torch.randint(1000, ()).item())
        model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
        inject(model, LoRA(r=2, target_modules=targets), seed=seed)
        return dict(model.named_parameters())["b.peft.default.lora_A"].detach()

    assert torch.equal(values(1, ["b"]), values(1, ["a", "b"]))
    assert not torch.equal(values(1, ["b"]), values(2, ["b"]))
    bound = 8**-0.5
    assert values(1, ["b"]).abs().max() <= bound


def test_copies_and_pickles_are_independent() -> None:
    model, inputs = build("llama")
    base = outputs(model, inputs)
    inject(model, LoRA(r=2))
    randomise(model)
    expected = outputs(model, inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(twin, inputs), expected)
        eject(twin)
        assert torch.equal(outputs(twin, inputs), base)
        assert torch.equal(outputs(model, inputs), expected)


@pytest.mark.parametrize("warm", [False, True])
def test_a_compiled_model_sees_its_adapters(warm: bool) -> None:
    torch.compiler.reset()  # torch 2.8 may end in a segmentation fault over what earlier tests compiled and let go
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(3, 8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    base = model(x)
    if warm:
        compiled(x)
    inject(compiled, LoRA(r=2))
    randomise(model)
    assert not torch.equal(model(x), base)
    assert torch.allclose(compiled(x), model(x))


@pytest.mark.parametrize(
    "name",
    ["", "a.b", "a b", "1a", "active", "training", "merged", "running", "root", "keys", "_orig_mod", "_handle", "hook"],
)
@pytest.mark.parametrize("operation", ["inject", "load", "combine"])
def test_a_name_that_cannot_be_one_is_refused(tmp_path: Path, name: str, operation: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    other = copy.deepcopy(model)
    inject(other, LoRA(r=2))
    save_adapter(other, tmp_path / "adapter")
    if operation == "combine":
        inject(model, LoRA(r=2))
    before = snapshot(model)
    operations: dict[str, Callable[[], Any]] = {
        "inject": lambda: inject(model, LoRA(r=2), name=name),
        "load": lambda: load_adapter(model, tmp_path / "adapter", name=name),
        "combine": lambda: combine(model, ["default"], [1.0], name),
    }
    with pytest.raises(PEFTError, match=f"adapter name {name!r}"):
        operations[operation]()
    assert_unchanged(model, before)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize("name", ["first", "second"])
def test_a_module_in_two_places_is_adapted_in_both(name: str) -> None:
    model, x = Shared(), torch.randn(2, 4)
    assert inject(model, LoRA(r=1, target_modules=[name])) == ["first"]
    randomise(model)
    a, b = (p.detach() for n, p in model.named_parameters() if "lora" in n)
    weight = model.first.weight + 16 * b @ a
    once = x @ weight.T + model.first.bias
    assert torch.allclose(model(x), once @ weight.T + model.first.bias, rtol=1e-4)


def test_a_patched_forward_is_adapted() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    plain = model[0].forward
    model[0].forward = lambda value: plain(value) * 2
    inject(model, LoRA(r=1))
    before = model(x)
    randomise(model)
    assert not torch.allclose(model(x), before)


def test_the_encoder_of_torch_is_adapted_in_eval_too() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 16)
    with torch.inference_mode():
        before = encoder(x)
    hosts = inject(encoder, LoRA(r=2))
    assert hosts == [f"layers.{i}.{part}" for i in (0, 1) for part in ("self_attn", "linear1", "linear2")]
    randomise(encoder)
    with torch.inference_mode():
        assert (encoder(x) - before).abs().max() > 1e-3


def test_several_adapters_switch() -> None:
    model, inputs = build("llama")
    inject(model, LoRA(r=2), name="a")
    randomise(model)
    with_a = outputs(model, inputs)
    inject(model, LoRA(r=3, target_modules="attention"), name="b")
    assert torch.equal(outputs(model, inputs), with_a)
    set_adapter(model, "b")
    assert torch.equal(outputs(model, inputs), outputs(*build("llama")))
    set_adapter(model, "a")
    assert torch.equal(outputs(model, inputs), with_a)


def test_a_second_injection_is_never_doubled() -> None:
    model, inputs = build("llama")
    inject(model, LoRA(r=2))
    randomise(model)
    expected, count = outputs(model, inputs), len(list(model.parameters()))
    inject(model, LoRA(r=2))
    assert torch.equal(outputs(model, inputs), expected)
    with pytest.raises(PEFTError, match="already has an adapter 'default'"):
        inject(model, LoRA(r=3))
    with pytest.raises(PEFTError, match=r"already injected into|already has"):
        inject(nn.ModuleDict({"inner": model}), LoRA(r=2))
    assert len(list(model.parameters())) == count


def test_adapters_stay_float32_in_a_bfloat16_model() -> None:
    model = nn.Sequential(nn.Linear(8, 8)).to(torch.bfloat16)
    inject(model, LoRA(r=2))
    model.to(torch.bfloat16)
    assert {p.dtype for n, p in model.named_parameters() if "lora" in n} == {torch.float32}
    assert model(torch.ones(1, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    model.double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "typo": ({"target_modules": ["q_prj"]}, "Nearest names: .*q_proj"),
    "some match": ({"target_modules": ["q_proj", "nope"]}, "'nope' matches no module"),
    "a block": ({"target_modules": "self_attn"}, "cannot be adapted"),
    "rank too large": ({"r": 33, "target_modules": "q_proj"}, r"at most 32\..*train_also="),
    "rank too large by pattern": ({"rank_pattern": {"q_proj": 33}}, "at most 32"),
    "no such layer": ({"layers": [7]}, "no layer"),
    "no slice": ({"layers": "a:b"}, "no slice"),
    "exclude typo": ({"exclude_modules": ["nope"]}, "exclude_modules: 'nope'"),
    "pattern typo": ({"rank_pattern": {"nope": 2}}, "rank_pattern: 'nope'"),
    "malformed": ({"target_modules": "re:("}, "malformed"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_changes_nothing(case: str) -> None:
    options, message = BAD[case]
    model, _ = build("llama")
    before = snapshot(model)
    with pytest.raises(PEFTError, match=message):
        inject(model, LoRA(**{"r": 2, **options}))
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "options", [{"r": 0}, {"r": -1}, {"r": 2.5}, {"alpha": 0}, {"alpha": float("nan")}, {"dropout": 1.0}, {"init": "x"}]
)
def test_bad_hyper_parameters(options: dict[str, Any]) -> None:
    with pytest.raises(PEFTError, match="was given"):
        LoRA(**options)


def test_unreachable_hosts_are_refused_by_name() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32)
    with pytest.raises(PEFTError, match=r"self_attn\.out_proj.*never calls it"):
        inject(model, LoRA(r=2, target_modules=["out_proj"]))


def test_a_regular_expression_is_bounded_in_time() -> None:
    model = nn.ModuleDict({"a" * 40 + "b": nn.Linear(4, 4)})
    start = time.monotonic()
    with pytest.raises(PEFTError, match="took more than"):
        inject(model, LoRA(r=1, target_modules="re:(a|a|aa)+$"))
    assert time.monotonic() - start < 10


def test_train_also_is_checked() -> None:
    model, _ = build("gpt2")
    with pytest.raises(PEFTError, match=r"shares a parameter with 'transformer\.wte'"):
        inject(model, LoRA(r=2), train_also=["lm_head"])
    with pytest.raises(PEFTError, match="train_also: '' matches no module"):
        inject(model, LoRA(r=2), train_also="")
    with pytest.raises(PEFTError, match="train_also trains every module"):
        inject(build("llama")[0], LoRA(r=2), train_also="re:.*")
    with pytest.raises(PEFTError, match="train_also: 'nope'"):
        inject(model, LoRA(r=2), train_also=["nope"])


SELECTED = {
    "layers.0.self_attn.q_proj": ["model.layers.0.self_attn.q_proj"],
    "layers.*.mlp.up_proj": [f"model.layers.{i}.mlp.up_proj" for i in (0, 1)],
    r"re:.*\.1\..*\.(q|v)_proj": ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"],
    "attention": [f"model.layers.{i}.self_attn.{k}_proj" for i in (0, 1) for k in "qkvo"],
    "mlp": [f"model.layers.{i}.mlp.{k}_proj" for i in (0, 1) for k in ("gate", "up", "down")],
}


@pytest.mark.parametrize("pattern", SELECTED)
def test_targets(pattern: str) -> None:
    assert inject(build("llama")[0], LoRA(r=2, target_modules=pattern)) == SELECTED[pattern]


@pytest.mark.parametrize(("layers", "expected"), [("1:", {"1"}), ([0], {"0"}), ("-1:", {"1"}), ("0:2", {"0", "1"})])
def test_layers(layers: Any, expected: set[str]) -> None:
    assert {host.split(".")[2] for host in inject(build("llama")[0], LoRA(r=2, layers=layers))} == expected


def test_adapters_are_in_the_mode_of_their_host() -> None:
    model, inputs = build("llama")
    inject(model, LoRA(r=2, dropout=0.5))
    randomise(model)
    assert not any(module.training for module in model.modules())
    assert torch.equal(outputs(model, inputs), outputs(model, inputs))
    model.train()
    inject(model, LoRA(r=2), name="second")
    assert all(module.training for module in model.modules())


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


def test_a_part_of_an_adapted_model_is_refused_and_the_model_named() -> None:
    model, x = Outer(), torch.randn(3, 4)
    inject(model, LoRA(r=2))
    randomise(model)
    expected, before = model(x), snapshot(model)
    for call in (lambda: inject(model.model, LoRA(r=4)), lambda: merge(model.model), lambda: eject(model.model)):
        with pytest.raises(
            PEFTError, match="This Sequential shares a part with the Outer into which its adapters were"
        ):
            call()
    assert_unchanged(model, before)
    assert torch.equal(model(x), expected)


def test_a_part_of_an_adapted_model_in_another_one_is_refused_until_it_is_plain() -> None:
    """As in packages that make a new module for each training of one network."""
    first, second = Outer(), Outer()
    inject(first, LoRA(r=2))
    randomise(first)
    second.model = first.model
    with pytest.raises(PEFTError, match=r"shares a part with the Outer.*merge_on_train_end='unload'"):
        inject(second, LoRA(r=2))
    merge(first, unload=True)
    assert inject(second, LoRA(r=2)) == ["model.0", "model.1"]


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_model_that_hf_peft_has_adapted_is_refused(wrapped: bool) -> None:
    config = peft.LoraConfig(r=2, target_modules=["0"])
    judge = peft.get_peft_model(Outer().model, config)
    model = nn.ModuleDict({"judge": judge if wrapped else judge.base_model.model})
    before = snapshot(model)
    with pytest.raises(PEFTError, match=r"HF PEFT has put adapters into this ModuleDict already: 'judge.*load_adapter"):
        inject(model, LoRA(r=2))
    assert_unchanged(model, before)
    assert inject(judge.unload(), LoRA(r=2)) == ["0", "1"]


def test_lazy_modules_are_refused_until_they_were_called() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4))
    with pytest.raises(PEFTError, match=r"'1\.weight' has no shape .*Call the model once"):
        inject(model, LoRA(r=2, target_modules=["0"]))
    model(torch.randn(2, 4))
    assert inject(model, LoRA(r=2)) == ["0", "1"]


def test_what_is_in_an_excluded_module_is_excluded() -> None:
    llama, _ = build("llama")
    assert all(".mlp." in name for name in inject(llama, LoRA(r=2, exclude_modules="self_attn")))
    mixtral, _ = build("mixtral")
    names = inject(mixtral, LoRA(r=2, exclude_modules="experts"))
    assert names
    assert all("self_attn" in name for name in names)


def test_a_name_that_adapters_have_is_refused() -> None:
    model = nn.ModuleDict({"peft": nn.Linear(4, 4), "other": nn.Linear(4, 4)})
    with pytest.raises(PEFTError, match="'peft' has a part called 'peft'"):
        inject(model, LoRA(r=2))


def test_what_is_trained_whole_may_have_any_of_its_names() -> None:
    model = nn.Module()
    model.stack = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    model.last = model.stack[1]
    inject(model, LoRA(r=2, target_modules=["0"]), train_also=["last"])
    assert model.last.weight.requires_grad
    assert not model.stack[0].weight.requires_grad


@pytest.mark.parametrize(("rank", "told"), [(None, True), (0, True), (1, False)])
def test_of_several_processes_the_first_tells(rank: int | None, told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that stands alone, without a group."""
    model, _ = build("sequential")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: rank is not None)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inject(model, LoRA(r=6))
    assert any("'2'" in str(warning.message) for warning in caught) is told
