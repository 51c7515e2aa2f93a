"""Several adapters in one batch, each row alone or HF PEFT's ``adapter_names`` as the judge."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, fill, outputs
from judges.hf_peft import judge_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_peft import (
    BEFT,
    IA3,
    OFT,
    AdaLoRA,
    BitFit,
    Compacter,
    DoRA,
    LoHa,
    LoKr,
    LoRA,
    LoReFT,
    MiSS,
    NewTokens,
    ParallelAdapter,
    PEFTError,
    PEFTMethod,
    PrefixTuning,
    SeriesAdapter,
    VeRA,
    adapter_names,
    disable,
    inject,
    load_adapter,
    merge,
    save_adapter,
    set_adapter,
)
from lightning_peft.core.method import registered_methods

ROWS = ["a", "b", "", "a", "c"]


def batch(family: str, rows: int) -> dict[str, Any]:
    """An input with ``rows`` different rows."""
    generator = torch.Generator().manual_seed(3)

    def longer(tensor: Tensor) -> Tensor:
        shape = (rows, *tensor.shape[1:])
        if tensor.is_floating_point():
            return torch.randn(shape, generator=generator)
        return torch.randint(3, 50, shape, generator=generator)

    return {key: longer(tensor) for key, tensor in build(family)[1].items()}


def adapted(family: str, methods: dict[str, PEFTMethod]) -> nn.Module:
    model = build(family)[0]
    for seed, (name, method) in enumerate(methods.items()):
        inject(model, method, name=name)
        fill(model, name, seed)
    return model


def alone(model: nn.Module, inputs: dict[str, Any], rows: Sequence[str]) -> Tensor:
    """Each row by itself, with its adapter active."""
    found = []
    for index, name in enumerate(rows):
        row = {key: value[index : index + 1] for key, value in inputs.items()}
        if name:
            set_adapter(model, name)
            found.append(outputs(model, row))
        else:
            with disable(model):
                found.append(outputs(model, row))
    return torch.cat(found)


def close(left: Tensor, right: Tensor) -> bool:
    return bool((left - right).abs().max() <= 1e-5 * right.abs().max().clamp(min=1.0))


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", ["q_proj", "v_proj", "down_proj"]),
        ("gpt2", ["c_attn", "c_fc"]),
        ("bert", ["query", "value"]),
        ("gemma3", ["embed_tokens", "q_proj"]),
        ("t5", ["q", "wo"]),
    ],
)
def test_lora_is_pefts(family: str, targets: list[str], tmp_path: Path) -> None:
    other = {"rank_pattern": {targets[0]: 1}, "alpha_pattern": {targets[0]: 7}}
    model = adapted(
        family,
        {
            "a": LoRA(r=2, target_modules=targets),
            "b": LoRA(r=5, alpha=3, target_modules=targets, **other),
            "c": LoRA(r=3, target_modules=targets[1:]),
        },
    )
    judge, inputs = judge_of(model, family, tmp_path), batch(family, len(ROWS))
    expected = judge(**inputs, adapter_names=[name or "__base__" for name in ROWS]).logits
    with torch.no_grad(), adapter_names(model, ROWS):
        first, again = outputs(model, inputs), outputs(model, inputs)
    assert close(first, expected)
    assert torch.equal(first, again)
    with_a = outputs(model, inputs)
    assert [close(row, other) for row, other in zip(first, with_a, strict=True)] == [name == "a" for name in ROWS]


BOTTLENECK = {"bottleneck": 4, "init": "normal"}
OTHERS: dict[str, tuple[str, PEFTMethod]] = {
    "series": ("llama", SeriesAdapter(**BOTTLENECK, train_norms=False)),
    "series beside attention in a tuple": (
        "llama",
        SeriesAdapter(**BOTTLENECK, target_modules=["self_attn"], train_norms=False),
    ),
    "series after layers": ("bert", SeriesAdapter(**BOTTLENECK, placement=["layer"], train_norms=False)),
    "series before the mlp": ("gpt2", SeriesAdapter(**BOTTLENECK, preset="llm_adapters", placement=["mlp_input"])),
    "parallel": ("llama", ParallelAdapter(**BOTTLENECK, placement=["attention", "mlp"])),
    "parallel on modules": ("vit", ParallelAdapter(**BOTTLENECK, target_modules=["attention"])),
    "compacter": ("t5", Compacter(bottleneck=8, train_norms=False)),
    "dora": ("gemma3", DoRA(r=2, target_modules=["embed_tokens", "q_proj"])),
    "ia3": ("llama", IA3()),
    "vera": ("gpt2", VeRA(r=4)),
    "loha": ("llama", LoHa(r=2)),
    "lokr": ("llama", LoKr(r=2)),
    "beft": ("llama", BEFT()),
    "miss": ("llama", MiSS(r=4)),
    "oft": ("llama", OFT(block_size=4)),
    "adalora": ("llama", AdaLoRA(init_r=3, target_r=2)),
    "new tokens": ("llama", NewTokens(token_indices=list(range(3, 50)))),
    "lora on parts": ("gpt2", LoRA(r=2, fused_parts=["q", "v"])),
    "lora": ("sequential", LoRA(r=2)),
    "lora with frozen A": ("bert", LoRA(r=2, freeze_A=True)),
}


@pytest.mark.parametrize("case", OTHERS)
def test_each_row_is_as_it_is_alone(case: str) -> None:
    """Beside two adapters of the method there is a LoRA, on partly the same modules."""
    family, method = OTHERS[case]
    model = adapted(family, {"a": method, "b": method, "c": LoRA(r=2)})
    inputs = batch(family, len(ROWS))
    expected = alone(model, inputs, ROWS)
    assert not close(expected, alone(model, inputs, ["a"] * len(ROWS)))
    with adapter_names(model, ROWS):
        assert close(outputs(model, inputs), expected)
    with torch.no_grad(), adapter_names(model, ["a", "b", "", "b", "a"]):
        assert close(outputs(model, inputs), alone_within(family, method, inputs))


def alone_within(family: str, method: PEFTMethod, inputs: dict[str, Any]) -> Tensor:
    return alone(adapted(family, {"a": method, "b": method}), inputs, ["a", "b", "", "b", "a"])


@pytest.mark.parametrize("rows", [["b", "a", "", "b"], ["a", "c", "b", "a"]], ids=["one activation", "several"])
@pytest.mark.parametrize("kind", [SeriesAdapter, ParallelAdapter])
def test_bottlenecks_of_different_forms(kind: Any, rows: list[str]) -> None:
    norms = {"train_norms": False} if kind is SeriesAdapter else {}
    forms = {
        "a": kind(bottleneck=4, activation="sigmoid", bias=True, scale=0.5, **norms),
        "b": kind(bottleneck=6, activation="sigmoid", bias=False, scale=2.0, **norms),
        "c": kind(bottleneck=4, activation="tanh", bias=True, **norms),
    }
    model, inputs = adapted("llama", forms), batch("llama", len(rows))
    expected = alone(model, inputs, rows)
    with adapter_names(model, rows):
        assert close(outputs(model, inputs), expected)


def test_every_method_is_tried_or_refused() -> None:
    tried = {type(method) for _, method in OTHERS.values()}
    refused = {"loreft", "prefix_tuning", "prompt_tuning"}
    alone_in_a_model = {"bitfit", "full_finetuning", "layer_norm_tuning"}
    ours = {n: m for n, m in registered_methods().items() if m.__module__.startswith("lightning_peft.")}
    assert {name for name, kind in ours.items() if kind not in tried} == refused | alone_in_a_model


@pytest.mark.parametrize("method", [LoRA(r=2), ParallelAdapter(bottleneck=4), DoRA(r=2)], ids=lambda m: m.name)
def test_gradients_are_the_sum_of_the_rows(method: PEFTMethod) -> None:
    model = adapted("llama", {"a": method, "b": method, "c": method}).double()
    inputs = batch("llama", len(ROWS))

    def gradients() -> dict[str, Tensor]:
        found = {n: p.grad.clone() for n, p in model.named_parameters() if ".peft." in n and p.grad is not None}
        model.zero_grad()
        return found

    expected: dict[str, Tensor] = {}
    for index, name in enumerate(ROWS):
        if name:
            set_adapter(model, name)
            outputs(model, {"input_ids": inputs["input_ids"][index : index + 1]}).square().sum().backward()
            for key, gradient in gradients().items():
                expected[key] = expected.get(key, 0) + gradient
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(".peft." in key)
    with adapter_names(model, ROWS):
        outputs(model, inputs).square().sum().backward()
    found = gradients()
    assert found.keys() == expected.keys()
    assert all((found[key] - gradient).abs().max() <= 1e-9 * gradient.abs().max() for key, gradient in expected.items())


@pytest.mark.parametrize("narrow", ["weights", "autocast"])
@pytest.mark.parametrize("grad", [False, True])
def test_in_bfloat16(narrow: str, grad: bool) -> None:
    model, inputs = adapted("sequential", {"a": LoRA(r=2), "b": LoRA(r=3)}), batch("sequential", 3)
    expected = alone(model, inputs, ["a", "b", ""])
    if narrow == "weights":
        model.to(torch.bfloat16)
        inputs = {key: value.to(torch.bfloat16) for key, value in inputs.items()}
    rows = torch.autocast("cpu", torch.bfloat16, enabled=narrow == "autocast")
    with torch.set_grad_enabled(grad), rows, adapter_names(model, ["a", "b", ""]):
        found = outputs(model, inputs)
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def replace(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if ".b." in name:
            parameter.data = parameter.detach() * 3


@pytest.mark.parametrize("change", [lambda model: fill(model, "b", 7), replace])
@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_values_that_change_within_the_context_count(change: Any, without_gradients: Any) -> None:
    """Also of adapters made in inference mode, which do not tell."""
    with without_gradients():
        model = adapted("llama", {"a": LoRA(r=2), "b": LoRA(r=2)})
        inputs = batch("llama", 2)
        with adapter_names(model, ["a", "b"]):
            before = outputs(model, inputs)
            change(model)
            after = outputs(model, inputs)
        assert torch.equal(before[0], after[0])
        assert close(after, alone(model, inputs, ["a", "b"]))
        assert not close(after, before)


NO_KERNELS = {"view", "_unsafe_view", "t", "transpose", "expand", "unsqueeze", "slice", "select", "detach", "alias"}


class Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ not in NO_KERNELS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "method", [LoRA(r=2), SeriesAdapter(bottleneck=4, train_norms=False)], ids=["lora", "series_adapter"]
)
def test_the_number_of_kernels_does_not_grow_with_the_adapters(method: PEFTMethod) -> None:
    names = [f"a{index}" for index in range(8)]
    model = adapted("llama", dict.fromkeys(names, method))
    inputs, counts = batch("llama", 8), []
    for rows in (["a0", "a1"] * 4, [*names[:-1], "a0"], names, ["a0"] * 8):
        with torch.no_grad(), adapter_names(model, rows):
            outputs(model, inputs)
            with Counted() as counted:
                outputs(model, inputs)
            counts.append(counted.count)
    assert counts[0] == counts[1] == counts[3] > counts[2]
    # With an adapter for each row there are no more than with one for all.
    with torch.no_grad(), Counted() as counted:
        outputs(model, inputs)
    assert counts[2] <= counted.count


def test_dropout_is_each_rows_own() -> None:
    model, x = nn.Sequential(nn.Linear(400, 4)), torch.ones(3, 400)
    base = model(x)
    for name, rate in (("a", 0.5), ("b", 0.0)):
        inject(model, LoRA(r=1, alpha=1, dropout=rate), name=name)
        adapter = model[0].peft[name]
        nn.init.ones_(adapter.lora_A)
        nn.init.ones_(adapter.lora_B)
    model.train()
    with adapter_names(model, ["a", "b", ""]):
        draws = torch.stack([model(x) - base for _ in range(100)])
    assert torch.allclose(draws[:, 1], torch.full((100, 4), 400.0), atol=1e-3)
    assert not draws[:, 2].any()
    assert draws[:, 0].std() > 10
    assert abs(draws[:, 0].mean() - 400) < 10
    model.eval()
    with adapter_names(model, ["a", "b", ""]):
        assert torch.allclose(model(x) - base, torch.tensor([[400.0], [400.0], [0.0]]).expand(3, 4), atol=1e-3)


def test_compiled_it_is_right_and_other_names_are_no_other_program() -> None:
    model = adapted("sequential", {name: LoRA(r=2) for name in "abc"}).requires_grad_(False)
    inputs = batch("sequential", 4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        with adapter_names(model, ["a", "b", "", "b"]):
            outputs(compiled, inputs)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for rows in (["b", "c", "", "b"], ["c", "a", "", "a"]):
                with adapter_names(model, rows):
                    assert close(outputs(compiled, inputs), outputs(model, inputs))


def test_generation_with_beams() -> None:
    model = adapted("llama", {"a": LoRA(r=2), "b": LoRA(r=2)})
    inputs = batch("llama", 2)
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = []
    for index, name in enumerate(["a", "b"]):
        set_adapter(model, name)
        expected.append(model.generate(inputs["input_ids"][index : index + 1], **options))
    with adapter_names(model, [name for name in ["a", "b"] for _ in range(3)]):
        found = model.generate(**inputs, **options)
    assert torch.equal(found, torch.cat(expected))
    with (
        pytest.raises(PEFTError, match=r"2 names were given.*6 rows was expected.*num_beams"),
        adapter_names(model, ["a", "b"]),
    ):
        model.generate(**inputs, **options)


def test_bad_input() -> None:
    model, inputs = adapted("llama", {"a": LoRA(r=2), "b": LoRA(r=2)}), batch("llama", 3)
    for names, message in (
        (["a", "x"], "There is no adapter 'x'. Adapters: a, b; ''"),
        ("ab", "'ab' was given; a list"),
        ([], "a list with the name"),
        ([None], "a list with the name"),
    ):
        with pytest.raises(PEFTError, match=message), adapter_names(model, names):
            pass
    before, message = outputs(model, inputs), r"2 names were given, but 'model.*works on a tensor of shape \[3, 7, 32\]"
    with pytest.raises(PEFTError, match=message), adapter_names(model, ["a", "b"]):
        outputs(model, inputs)
    assert torch.equal(outputs(model, inputs), before)
    with adapter_names(model, ["a", "b", ""]):
        for action in (lambda: set_adapter(model, "b"), lambda: merge(model), lambda: inject(model, LoRA(), name="c")):
            with pytest.raises(PEFTError, match=r"inside of .*adapter_names"):
                action()
        inside = outputs(model, inputs)
        with disable(model):
            assert torch.equal(outputs(model, inputs), outputs(*[build("llama")[0], inputs]))
        assert torch.equal(outputs(model, inputs), inside)
    merge(model)
    with pytest.raises(PEFTError, match=r"merged.*unmerge"), adapter_names(model, ["a"]):
        pass


class Flat(nn.Module):
    """Works on tokens, as mixtures of experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4)])
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[0](self.linear(x.flatten(0, 1))).view_as(x)


def test_modules_whose_first_dimension_is_not_the_batch() -> None:
    model, x = Flat(), torch.randn(2, 3, 4)
    inject(model, LoRA(r=1, target_modules=["linear"]), name="a")
    inject(model, LoRA(r=1, target_modules=["0"]), name="b")
    with (
        pytest.raises(PEFTError, match=r"'linear' works on a tensor of shape \[6, 4\]"),
        adapter_names(model, ["a", ""]),
    ):
        model(x)
    with pytest.raises(PEFTError, match=r"'experts.0', an expert"), adapter_names(model, ["b", ""]):
        pass
    encoder = nn.TransformerEncoderLayer(8, 2, 16)
    inject(encoder, LoRA(r=1, exclude_modules="self_attn"))
    with (
        pytest.raises(PEFTError, match=r"'self_attn' works on tensors.*batch_first"),
        adapter_names(encoder, ["default"]),
    ):
        pass


def test_methods_that_look_at_the_whole_batch_are_refused() -> None:
    for method, said in ((PrefixTuning(num_virtual_tokens=2), "Prefix"), (LoReFT(r=2), "(LoReFT|Places)")):
        model = build("llama")[0]
        inject(model, method)
        refused = pytest.raises(PEFTError, match=rf"'default' is a {said}.*set_adapter")
        with refused, adapter_names(model, ["default"]):
            pass
    model = build("bert")[0]
    inject(model, BitFit())
    with pytest.raises(PEFTError, match=r"'' was given, but .*bias' is trained"), adapter_names(model, ["default", ""]):
        pass


def test_adapters_from_files_side_by_side(tmp_path: Path) -> None:
    """The usual way: one base model, adapters from directories."""
    source = adapted("llama", {"a": LoRA(r=2), "b": LoRA(r=3)})
    for name in "ab":
        save_adapter(source, tmp_path / name, name=name)
    model, inputs = build("llama")[0], batch("llama", 2)
    for name in "ab":
        load_adapter(model, tmp_path / name, name=name)
    with adapter_names(model, ["b", "a"]):
        assert close(outputs(model, inputs), alone(source, inputs, ["b", "a"]))
