"""The hand-written products of LoRA against its formula in float64, and the cases in which they must step aside."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lightning_peft import LoRA, inject
from lightning_peft.adapters.low_rank import products
from lightning_peft.adapters.low_rank.dropout import drop, kept_fraction
from lightning_peft.adapters.low_rank.linear import LoRAAdapter

IN, OUT, SCALE = 6, 5, 2.0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many matrices each call of the hand-written product got."""
    seen: list[int] = []
    original = products.First.apply

    def apply(*args: Any) -> Any:
        seen.append(args[2][-1])
        return original(*args)

    monkeypatch.setattr(products.First, "apply", apply)
    return seen


def filled(model: nn.Module, **options: Any) -> nn.Module:
    inject(model, LoRA(**{"r": 2, "alpha": 2 * SCALE, **options}), seed=1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return model


def layer(kind: str = "linear", dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    made = Conv1D(OUT, IN) if kind == "conv1d" else nn.Linear(IN, OUT, bias=kind == "linear with bias")
    return filled(made.to(dtype), target_modules=[""])


def lora(host: nn.Module) -> LoRAAdapter:
    adapter = host.get_submodule("peft.default")
    assert isinstance(adapter, LoRAAdapter)
    return adapter


def formula(host: nn.Module, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    weight = host.weight.detach().T if isinstance(host, nn.Linear) else host.weight.detach()
    result = torch.einsum("...i,io->...o", x, weight) + SCALE * torch.einsum("...i,ri,or->...o", x, a, b)
    return result if host.bias is None else result + host.bias.detach()


SHAPES: dict[str, Callable[[], Tensor]] = {
    "vector": lambda: torch.randn(IN),
    "rows": lambda: torch.randn(3, IN),
    "batch": lambda: torch.randn(2, 3, IN),
    "four dimensions": lambda: torch.randn(2, 3, 2, IN),
    "no rows": lambda: torch.randn(0, IN),
    "transposed": lambda: torch.randn(3, 2, IN).transpose(0, 1),
    "sliced": lambda: torch.randn(2, 3, 2 * IN)[..., ::2],
    "expanded": lambda: torch.randn(1, 3, IN).expand(2, 3, IN),
}


KINDS = ["linear", "linear with bias", "conv1d"]
# Conv1D itself takes no input that cannot be viewed as rows.
SHAPES_OF = [(k, s) for k in KINDS for s in SHAPES if k != "conv1d" or s not in ("transposed", "sliced", "expanded")]


@pytest.mark.parametrize("frozen", ["nothing", "x", "lora_A", "lora_B"])
@pytest.mark.parametrize(("kind", "shape"), SHAPES_OF)
@pytest.mark.parametrize("large", [True, False])
def test_outputs_and_gradients(
    kind: str, shape: str, frozen: str, large: bool, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_MANY_ON_CPU", 0 if large else 2**20)
    host = layer(kind)
    torch.manual_seed(1)
    x = SHAPES[shape]().double().requires_grad_(frozen != "x")
    a, b = (getattr(lora(host), name) for name in ("lora_A", "lora_B"))
    for name, matrix in (("lora_A", a), ("lora_B", b)):
        matrix.requires_grad_(frozen != name)
    wanted = [tensor for tensor in (x, a, b) if tensor.requires_grad]
    expected, result = formula(host, x, a, b), host(x)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(expected)
    ours = torch.autograd.grad((result * weights).sum(), wanted)
    for got, right in zip(ours, torch.autograd.grad((expected * weights).sum(), wanted), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(host.eval()(x), expected, rtol=1e-12, atol=1e-12)
    assert calls == [1] * large


def test_what_is_large(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    """On a GPU more; with dropout, of which the plain expression keeps copies, as little as on a CPU."""
    monkeypatch.setattr(products, "_MANY_ON_CPU", 4)
    monkeypatch.setattr(products, "_MANY", 6)
    cases = [("cpu", False, 4), ("cpu", True, 4), ("meta", False, 6), ("meta", True, 4)]
    for device, drops, least in cases:
        assert [products.is_large(torch.empty(n, device=device), drops) for n in (least - 1, least)] == [False, True]
    host = layer().to("meta").train()
    x = torch.empty(5, 1, IN, device="meta", dtype=torch.float64)
    monkeypatch.setattr(products, "_MANY", x.numel() + 1)
    host(x)
    assert not calls
    lora(host).dropout = 0.1
    host(x)
    assert calls == [1]
    host.eval()(x)
    assert calls == [1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("large", [True, False])
def test_first_and_second_derivatives(
    kind: str, large: bool, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_MANY_ON_CPU", 0 if large else 2**20)
    host = layer(kind)
    names = ["peft.default.lora_A", "peft.default.lora_B"]
    inputs = [torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)]
    inputs += [host.get_parameter(name).detach().clone().requires_grad_() for name in names]

    def function(x: Tensor, *matrices: Tensor) -> Tensor:
        return functional_call(host, dict(zip(names, matrices, strict=True)), (x,)).tanh()

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    assert bool(calls) is large


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("narrow", [False, True])
def test_second_derivatives_of_layers_with_one_input(narrow: bool, p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the plain expression in float64; as near to them as it is itself where input and matrices are cast."""
    model, values = block(dropout=p), torch.randn(8, IN) / 4
    if p:
        # One mask for all calls, so that the plain expression, which draws one for each layer, has the same.
        mask = drop(torch.ones(8, 2 * IN), p)[1]
        kept = kept_fraction(p, values.device)
        monkeypatch.setattr(products, "drop", lambda x, p: (x * mask[:, : x.shape[1]], mask[:, : x.shape[1]], 1 / kept))
        monkeypatch.setattr(nn.functional, "dropout", lambda x, p, training: x * mask[:, : x.shape[-1]] / kept)

    def second(dtype: torch.dtype, narrow: bool) -> list[Tensor]:
        model.to(dtype)
        x = values.to(dtype, copy=True).requires_grad_()
        wanted = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            loss = model(x).to(dtype).square().mean()
        first = torch.autograd.grad(loss, wanted, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), wanted))

    exact = plain(monkeypatch, lambda: second(torch.float64, False))
    if not narrow:
        for got, right in zip(second(torch.float64, False), exact, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-11, atol=1e-11)
        return

    def error(found: list[Tensor]) -> float:
        return max(float((g.double() - e).norm() / e.norm()) for g, e in zip(found, exact, strict=True))

    ours, theirs = second(torch.float32, True), plain(monkeypatch, lambda: second(torch.float32, True))
    assert error(ours) < 3 * error(theirs) < 0.3


def test_the_gradient_of_the_layer_is_added_to_and_not_kept(calls: list[int]) -> None:
    """A second backward pass over one graph gives the same gradients: what is added to in place is fresh each time."""
    host, x = layer(), torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    loss = host(x).square().sum()
    first = torch.autograd.grad(loss, [x, *lora(host).parameters()], retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(loss, [x, *lora(host).parameters()])
    for gradient, again, copied in zip(first, second, kept, strict=True):
        assert torch.equal(gradient, copied)
        assert torch.equal(gradient, again)
    assert calls == [1]


class Attention(nn.Module):
    """Query, key and value projections of one input, or of two."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(IN, OUT, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(OUT, IN, bias=False)

    def forward(self, x: Tensor, memory: Tensor | None = None, use: str = "qkv") -> Tensor:
        other = x if memory is None else memory
        parts = {"q": lambda: self.q_proj(x), "k": lambda: self.k_proj(other), "v": lambda: self.v_proj(other)}
        return self.o_proj(torch.stack([parts[name]() for name in use]).prod(dim=0))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.gate_proj, self.up_proj = (nn.Linear(IN, 2 * IN, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(2 * IN, IN, bias=False)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = x + self.self_attn(x, *args, **kwargs)
        return x + self.down_proj(self.gate_proj(x).tanh() * self.up_proj(x))


def block(**options: Any) -> Layer:
    torch.manual_seed(0)
    model = filled(Layer().double(), **options)
    assert isinstance(model, Layer)
    return model


def gradients(model: nn.Module, *args: Any, **kwargs: Any) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    model(*args, **kwargs).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None]


def plain(monkeypatch: pytest.MonkeyPatch, function: Callable[[], Any]) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr("lightning_peft.adapters.low_rank.linear.product_dtype", lambda *_: None)
        return function()


CASES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "one input": ({}, [3, 1, 2, 1]),
    "keys of another input": ({"memory": torch.randn(3, IN, dtype=torch.float64)}, [3, 2, 1, 2, 1]),
    "values are not called": ({"use": "qk"}, [3, 1, 2, 1]),
    "another order": ({"use": "vkq"}, [1, 2, 3, 1, 2, 1]),
}


@pytest.mark.parametrize("case", CASES)
def test_layers_with_one_input_share_a_product(case: str, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    options, sizes = CASES[case]
    model, x = block(rank_pattern={"k_proj": 1}), torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    ours = gradients(model, x, **options)
    assert calls == sizes
    right = plain(monkeypatch, lambda: gradients(model, x, **options))
    assert calls == sizes
    for got, expected in zip(ours, right, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_an_input_that_was_changed_is_no_longer_the_same(calls: list[int]) -> None:
    model = block().self_attn
    x = torch.randn(3, IN, dtype=torch.float64)
    model.q_proj(x)
    x.mul_(2)
    key = model.k_proj(x)
    torch.testing.assert_close(key, formula(model.k_proj, x, lora(model.k_proj).lora_A, lora(model.k_proj).lora_B))
    assert calls == [3, 2]


def test_nothing_of_a_step_outlives_it() -> None:
    model = block()
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    hidden = x * 2
    watched = weakref.ref(hidden)
    output = model(hidden)
    gc.collect()
    assert watched() is hidden
    del hidden
    assert watched() is not None, "the graph holds it"
    del output
    gc.collect()
    assert watched() is None


def test_a_call_that_failed_leaves_nothing_behind() -> None:
    """Its input's products would be added to the output of the next call that computes none."""
    host = layer()
    with pytest.raises(RuntimeError):
        host(torch.randn(3, IN + 1, dtype=torch.float64))
    x = torch.randn(3, IN, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(host.eval()(x), formula(host, x, lora(host).lora_A, lora(host).lora_B))


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_shares_its_own_products(twin_of: Callable[[nn.Module], Any], calls: list[int]) -> None:
    model, x = block(), torch.randn(3, IN, dtype=torch.float64)
    twin = twin_of(model)
    shared = lora(twin.self_attn.q_proj).shared_input
    assert shared is lora(twin.self_attn.k_proj).shared_input
    assert shared.members == tuple(
        lora(m) for m in (twin.self_attn.q_proj, twin.self_attn.k_proj, twin.self_attn.v_proj)
    )
    with torch.no_grad():
        lora(model.self_attn.k_proj).lora_A.zero_()
    torch.testing.assert_close(twin(x), block()(x), rtol=0, atol=0)
    assert calls == [3, 1, 2, 1] * 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = block(dropout=0.3).train(), torch.randn(3, IN, dtype=torch.float64, requires_grad=True)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    for got, expected in zip(gradients(Checkpointed(), x), gradients(model, x), strict=True):
        assert torch.equal(got, expected)


# Dropout.


def identity(p: float) -> nn.ModuleDict:
    """Two projections of one input whose outputs are what dropout leaves of it."""
    model = nn.ModuleDict({"attn": nn.ModuleDict({f"{n}_proj": nn.Linear(64, 64, bias=False) for n in "qkvo"})})
    inject(model, LoRA(r=64, alpha=64, dropout=p))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.zero_() if name.endswith("proj.weight") else nn.init.eye_(parameter)
    return model.train()


def test_dropout_zeroes_elements_of_a_shared_input_for_all_its_layers(calls: list[int]) -> None:
    p, attn = 0.25, identity(0.25)["attn"]
    x = torch.rand(500, 64).add(1).requires_grad_()
    torch.manual_seed(0)
    q, k = attn["q_proj"](x), attn["k_proj"](x)
    assert calls == [3]
    assert torch.equal(q, k)
    kept = q != 0
    torch.testing.assert_close(q, torch.where(kept, x / (1 - p), 0.0))
    # Five standard deviations of the mean of 32,000 draws, and of 500 for each column.
    assert abs(kept.float().mean() - (1 - p)) < 5 * (p * (1 - p) / kept.numel()) ** 0.5
    assert (kept.float().mean(dim=0) - (1 - p)).abs().max() < 5 * (p * (1 - p) / 500) ** 0.5
    other = attn["q_proj"](x)
    assert not torch.equal(other != 0, kept)
    (gradient,) = torch.autograd.grad(q.sum() + 2 * k.sum(), x)
    torch.testing.assert_close(gradient, torch.where(kept, 3 / (1 - p), 0.0))


@pytest.mark.parametrize("p", [0.05, 0.1, 0.9])
def test_the_draws_of_dropout(p: float) -> None:
    torch.manual_seed(3)
    x = torch.rand(1003, 257) + 1
    values, mask, scale = drop(x, p)
    assert abs(kept_fraction(p, x.device) - (1 - p)) < 2**-17
    assert torch.equal(values, torch.where(mask, x, 0.0))
    assert scale == 1 / kept_fraction(p, x.device)
    deviation = (p * (1 - p)) ** 0.5
    # Each of the four elements that share a draw, and pairs of them.
    lanes = mask.flatten()[: 4 * (mask.numel() // 4)].view(-1, 4).double()
    assert ((lanes.mean(dim=0) - (1 - p)).abs() < 5 * deviation / len(lanes) ** 0.5).all()
    correlations = torch.corrcoef(lanes.T) - torch.eye(4, dtype=torch.float64)
    assert (correlations.abs() < 5 / len(lanes) ** 0.5).all()
    assert not torch.equal(drop(x, p)[1], mask)


def test_gradients_under_dropout(calls: list[int]) -> None:
    """The mask is read off by an input of ones; the same seed draws it again."""
    host = layer().train()
    adapter = lora(host)
    adapter.dropout = 0.4
    x = torch.randn(4, 3, IN, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(7)
    mask = drop(torch.ones(12, IN, dtype=torch.float64), 0.4)[1].view(4, 3, IN) / kept_fraction(0.4, x.device)
    torch.manual_seed(7)
    result = host(x)
    a, b = adapter.lora_A, adapter.lora_B
    expected = formula(host, x, a * 0, b * 0) + SCALE * (x * mask) @ a.T @ b.T
    torch.testing.assert_close(result, expected)
    for create_graph in (True, False):
        ours = torch.autograd.grad(result.square().sum(), [x, a, b], create_graph=create_graph, retain_graph=True)
        right = torch.autograd.grad(expected.square().sum(), [x, a, b], retain_graph=True)
        for got, wanted in zip(ours, right, strict=True):
            torch.testing.assert_close(got, wanted)
    assert calls == [1]


def test_no_dropout_in_evaluation(calls: list[int]) -> None:
    host, x = layer().eval(), torch.randn(3, IN, dtype=torch.float64)
    lora(host).dropout = 0.9
    expected = formula(host, x, lora(host).lora_A, lora(host).lora_B)
    torch.testing.assert_close(host(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(host(x), expected)
    assert calls == [1]


# Dtypes.


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_float32_adapters_of_a_narrow_computation(
    narrow: torch.dtype, autocast: bool, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As near to the float64 gradients as the plain expression is, and of the same dtypes."""
    values = torch.randn(64, IN) / 4
    exact = gradients(block(), values.double())
    calls.clear()
    model = block()
    adapters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for parameter in model.parameters():
        parameter.data = parameter.data.float() if autocast or parameter.requires_grad else parameter.data.to(narrow)
    x = values.requires_grad_() if autocast else values.to(narrow).requires_grad_()

    def run() -> list[Tensor]:
        x.grad = None
        with torch.autocast("cpu", narrow, enabled=autocast):
            found = gradients(model, x)
        assert x.grad is not None
        assert x.grad.dtype == x.dtype
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapters.values())
        return found

    def error(found: list[Tensor]) -> float:
        return max(float((g.double() - e).norm() / e.norm()) for g, e in zip(found, exact, strict=True))

    ours = run()
    assert calls == [3, 1, 2, 1]
    theirs = plain(monkeypatch, run)
    assert error(ours) < 1.5 * error(theirs) < 0.1


def test_values_written_past_autograd_are_seen() -> None:
    """As averages of weights are: through ``.data``, which leaves no trace."""
    host, x = layer().eval(), torch.randn(1, IN).bfloat16()
    host.weight.data = host.weight.detach().bfloat16()
    adapter = lora(host).float()
    with torch.no_grad():
        assert not torch.equal(host(x), nn.functional.linear(x, host.weight))
        adapter.lora_B.data.zero_()
        assert torch.equal(host(x), nn.functional.linear(x, host.weight))


@pytest.mark.parametrize("kind", KINDS)
def test_untrained_adapters_change_no_bit(kind: str, calls: list[int]) -> None:
    host, x = layer(kind, torch.float32), torch.randn(2, 3, IN)
    with torch.no_grad():
        lora(host).lora_B.zero_()
    adapter = host._modules.pop("peft")
    hooks = [dict(found) for found in (host._forward_hooks, host._forward_pre_hooks)]
    host._forward_hooks.clear()
    host._forward_pre_hooks.clear()
    expected = host(x)
    host._modules["peft"] = adapter
    host._forward_hooks.update(hooks[0])
    host._forward_pre_hooks.update(hooks[1])
    assert torch.equal(host(x), expected)
    assert calls == [1]


def test_second_derivatives_of_a_narrow_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    model, values = block(), torch.randn(64, IN) / 4

    def penalty(x: Tensor, narrow: bool) -> list[Tensor]:
        trained = [p for p in model.parameters() if p.requires_grad]
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(gradient.square().sum(), trained))

    exact = plain(monkeypatch, lambda: penalty(values.double().requires_grad_(), narrow=False))
    model.float()
    for got, expected in zip(penalty(values.requires_grad_(), narrow=True), exact, strict=True):
        assert (got - expected).norm() / expected.norm() < 0.1


def test_layers_that_share_an_input_share_its_cast(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen layer is called with the cast input, without a graph."""
    given: list[Tensor] = []
    original = nn.Linear.forward

    def forward(module: nn.Linear, x: Tensor) -> Tensor:
        given.append(x)
        return original(module, x)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    model = block().float().self_attn
    x = torch.randn(3, IN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    assert calls == [3, 1]
    assert [read.dtype for read in given] == [torch.bfloat16] * 4
    assert given[0] is given[1] is given[2]
    assert not any(read.requires_grad for read in given)


def test_no_cast_copy_of_a_frozen_weight_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def copies() -> int:
        model, kept = block().float(), []

        def pack(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
            model(torch.randn(9, IN, requires_grad=True))
        shapes = {
            shape for m in model.modules() if isinstance(m, nn.Linear) for shape in (m.weight.shape, m.weight.T.shape)
        }
        return sum(tensor.dtype == torch.bfloat16 and tensor.shape in shapes for tensor in kept)

    assert copies() == 0
    assert plain(monkeypatch, copies) == 7


def nodes(tensor: Tensor) -> set[str]:
    found, waiting = set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None:
            found.add(type(node).__name__)
            waiting += [following for following, _ in node.next_functions]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_is_not_changed_through_a_view(kind: str) -> None:
    output = layer(kind)(torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True))
    assert "FirstBackward" in nodes(output)
    assert "CopySlices" not in nodes(output)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("narrow", [False, True])
def test_a_layer_that_is_trained_as_well(bias: bool, narrow: bool, calls: list[int]) -> None:
    """It keeps a graph of its own, and gets its gradients from there."""
    host = layer("linear with bias")
    trained = host.bias if bias else host.weight
    trained.requires_grad_()
    host.float() if narrow else host
    x = torch.randn(4, 3, IN, dtype=host.weight.dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        result = host(x)
    assert calls == [1]
    a, b = lora(host).lora_A, lora(host).lora_B
    expected = formula(host, x, a, b) + (x @ (host.weight - host.weight.detach()).T + (host.bias - host.bias.detach()))
    tolerance = {"rtol": 0.05, "atol": 0.3} if narrow else {}
    torch.testing.assert_close(result.to(expected.dtype), expected, **tolerance)
    wanted = [x, a, b, trained]
    firsts = [torch.autograd.grad(y.square().sum(), wanted, create_graph=True) for y in (result, expected)]
    for got, right in zip(*firsts, strict=True):
        assert got.dtype == right.dtype
        torch.testing.assert_close(got, right, **({"rtol": 0.05, "atol": 0.05 * float(right.norm())} if narrow else {}))
    if not narrow:
        seconds = [torch.autograd.grad(sum(g.square().sum() for g in first), wanted) for first in firsts]
        for got, right in zip(*seconds, strict=True):
            torch.testing.assert_close(got, right)


# Where the plain expression has to be used.


def aside(result: Tensor, expected: Tensor, calls: list[int]) -> None:
    torch.testing.assert_close(result, expected)
    assert not calls


def test_subclasses_patched_and_hooked_layers(calls: list[int]) -> None:
    class Other(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    torch.manual_seed(0)
    subclass = filled(Other(IN, OUT).double(), target_modules=[""])
    patched, hooked = layer(), layer()
    original = patched.forward
    patched.forward = lambda x: original(x)  # type: ignore[method-assign]
    seen: list[Tensor] = []
    hooked.register_full_backward_hook(lambda module, grad_input, grad_output: seen.append(grad_input[0]))
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    for host in (subclass, patched, hooked):
        a, b = lora(host).lora_A, lora(host).lora_B
        aside(host(x), formula(host, x, a, b), calls)
    hooked(x).sum().backward()
    base, low_rank = hooked.weight, SCALE * lora(hooked).lora_B @ lora(hooked).lora_A
    torch.testing.assert_close(x.grad, (base + low_rank).sum(dim=0).expand(3, IN))
    assert seen


def test_layers_whose_input_others_look_at(calls: list[int]) -> None:
    """What they see is part of the graph: a loss of it reaches what came before."""
    seen: list[Tensor] = []

    def see(module: nn.Module, args: tuple[Tensor, ...], *output: Tensor) -> None:
        if isinstance(module, nn.Linear):
            seen.append(args[0])

    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    for register in (
        lambda host: host.register_forward_pre_hook(see),
        lambda host: host.register_forward_hook(see),
        lambda host: nn.modules.module.register_module_forward_pre_hook(see),
        lambda host: nn.modules.module.register_module_forward_hook(see),
    ):
        host = layer()
        handle = register(host)
        a, b = lora(host).lora_A, lora(host).lora_B
        seen.clear()
        aside(host(x), formula(host, x, a, b), calls)
        assert torch.equal(torch.autograd.grad(seen[-1].sum(), x)[0], torch.ones_like(x))
        handle.remove()
        host(x)
        assert calls.pop() == 1


def test_an_output_that_is_changed_in_place() -> None:
    host, x = layer(), torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
    a, b = lora(host).lora_A, lora(host).lora_B
    ours = torch.autograd.grad(host(x).relu_().square().sum(), [x, a, b])
    for got, right in zip(
        ours, torch.autograd.grad(formula(host, x, a, b).relu().square().sum(), [x, a, b]), strict=True
    ):
        torch.testing.assert_close(got, right)


def test_forward_mode(calls: list[int]) -> None:
    host, x, t = layer(), *torch.randn(2, 3, IN, dtype=torch.float64)
    a, b = lora(host).lora_A, lora(host).lora_B
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(host(forward_ad.make_dual(x, t))).tangent
    base = formula(host, torch.zeros_like(t), a, b)
    aside(tangent, formula(host, t, a, b) - base, calls)


def test_function_transforms(calls: list[int]) -> None:
    host, x = layer(), torch.randn(3, 2, IN, dtype=torch.float64)
    a, b = lora(host).lora_A.detach(), lora(host).lora_B.detach()
    torch.testing.assert_close(torch.func.vmap(host)(x), formula(host, x, a, b))
    parameters = {"peft.default.lora_A": a, "peft.default.lora_B": b}
    ours = torch.func.grad(lambda p: functional_call(host, p, (x,)).square().sum())(parameters)
    right = torch.func.grad(lambda p: formula(host, x, *p.values()).square().sum())(parameters)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, right[name])
    assert not calls


def test_an_input_that_is_cast_on_the_way(calls: list[int]) -> None:
    host, x = layer(), torch.randn(3, IN, requires_grad=True)
    host.register_forward_pre_hook(lambda module, args: args[0].double())
    a, b = lora(host).lora_A, lora(host).lora_B
    expected = formula(host, x.double(), a, b)
    aside(host(x), expected, calls)
    torch.testing.assert_close(torch.autograd.grad(host(x).sum(), a), torch.autograd.grad(expected.sum(), a))


def test_compiled_without_a_graph_break() -> None:
    model, x = block(), torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    expected, graphs = gradients(model, x), []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(str(graph.graph))
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for got, right in zip(gradients(compiled, x), expected, strict=True):
        torch.testing.assert_close(got, right)
    assert graphs
    assert not any("autograd_function" in graph for graph in graphs)


def test_no_memory_of_an_input_outlives_a_step() -> None:
    """Nor does that of its copies without a graph, which are other tensors in the same memory."""
    model = block()
    memory = numpy.ones((3, IN))
    alive = weakref.ref(memory)
    x = torch.from_numpy(memory).requires_grad_()
    model(x).sum().backward()
    del x, memory
    gc.collect()
    assert alive() is None
