"""What is right on a CPU, on a GPU: other kernels, other dtypes, dropout drawn elsewhere."""

import copy

import pytest
import torch
from benchmarks import measure, subjects, variants
from torch import Tensor, nn

from lightning_peft import LoRA, adapter_names, inject, merge, unmerge
from lightning_peft.adapters.low_rank import products
from lightning_peft.adapters.low_rank.dropout import drop, drop_again

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def every_input_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_MANY_ON_CPU", 0)
    monkeypatch.setattr(products, "_MANY", 0)


CONFIG = subjects.LlamaConfig(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
)


def model(dropout: float = 0.0) -> nn.Module:
    made = subjects.Shape(CONFIG, 1, 1).build()
    inject(made, LoRA(r=8, dropout=dropout))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    return made


def loss_of(y: Tensor) -> Tensor:
    """Not the mean of squares, which the last norm holds at one."""
    return (y.float() if y.dtype != torch.float64 else y).sigmoid()[..., ::2].square().mean()


def gradients(made: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    made.zero_grad()
    loss_of(made(x)).backward()
    return [g for g in (x.grad, *(p.grad for p in made.parameters() if p.requires_grad)) if g is not None]


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    return max(float((f.cpu().double() - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "bf16-mixed", "16-mixed"])
def test_gradients_are_as_near_to_float64_as_those_of_the_plain_expression(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, x = model(), torch.randn(2, 64, 256)
    exact = gradients(copy.deepcopy(made).double(), x.double())
    stored = getattr(torch, kind) if hasattr(torch, kind) else torch.float32
    computed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(kind, torch.float32)
    for parameter in made.parameters():
        parameter.data = parameter.data.to("cuda", torch.float32 if parameter.requires_grad else stored)
    made.to("cuda")

    def run() -> float:
        with torch.autocast("cuda", computed, enabled="mixed" in kind):
            return error(gradients(made, x.to("cuda", stored)), exact)

    ours, calls, original = 0.0, [], products.First.apply
    with monkeypatch.context() as patch:
        patch.setattr(products.First, "apply", lambda *args: (calls.append(1), original(*args))[1])
        ours = run()
    assert len(calls) == 2 * 4
    with monkeypatch.context() as patch:
        patch.setattr("lightning_peft.adapters.low_rank.linear.product_dtype", lambda *_: None)
        theirs = run()
    assert ours < 1.5 * theirs + 1e-6
    assert theirs < 0.1


def test_dropout() -> None:
    p, x = 0.3, torch.rand(2000, 512, device="cuda") + 1
    values, mask, left = drop(x, p)
    torch.testing.assert_close(values * left, torch.where(mask, x / (1 - p), 0.0))
    assert abs(float(mask.float().mean()) - (1 - p)) < 5 * (p * (1 - p) / x.numel()) ** 0.5
    again, rest = drop_again(x, mask, 1 - p)
    torch.testing.assert_close(again * rest, values * left)


def test_gradients_under_dropout() -> None:
    """Against differences of the loss: the same seed draws the same mask."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)).to("cuda", torch.float64)
    inject(made, LoRA(r=8, dropout=0.4, target_modules=["0", "2"]))
    for parameter in made.parameters():
        parameter.data.normal_(std=0.2)
    x = torch.randn(2, 8, 64, dtype=torch.float64, device="cuda")

    def loss() -> Tensor:
        torch.manual_seed(0)
        return loss_of(made(x))

    made.zero_grad()
    loss().backward()
    generator = torch.Generator("cuda").manual_seed(1)
    for parameter in [p for p in made.parameters() if p.requires_grad]:
        way = torch.randn(parameter.shape, generator=generator, device="cuda", dtype=torch.float64)
        ends = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter.add_(way, alpha=step)
                ends.append(float(loss()))
                parameter.sub_(way, alpha=step)
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(float((parameter.grad * way).sum()), rel=1e-6, abs=1e-9)


def test_merge_decode_and_rows() -> None:
    made, x = model().cuda().eval(), torch.randn(3, 8, 256, device="cuda")
    inject(made, LoRA(r=4), name="other")
    with torch.inference_mode():
        both = made(x)
        with adapter_names(made, ["default", "other", "default"]):
            rows = made(x)
        torch.testing.assert_close(rows[::2], both[::2], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(rows[1], both[1], rtol=1e-3, atol=1e-3)
    before = [p.clone() for p in made.parameters()]
    merge(made)
    with torch.no_grad():
        torch.testing.assert_close(made(x), both, rtol=1e-3, atol=1e-3)
    unmerge(made)
    assert all(torch.equal(p, q) for p, q in zip(made.parameters(), before, strict=True))


def test_a_step_keeps_what_the_bound_keeps_and_its_inputs() -> None:
    """On the GPU as counted on the CPU: less than HF peft, with dropout much less."""
    shape = subjects.Shape(CONFIG, 2, 512)
    subject, hidden = shape.build("cuda", torch.bfloat16), shape.inputs("cuda", torch.bfloat16)
    found = {}
    for variant in variants.present(variants.OURS, variants.PEFT):
        for dropout in (0.0, 0.05):
            made = variant.build(subject, dropout)
            measure.training_step(made, hidden, None)
            found[variant.name, dropout] = measure.peak_bytes(lambda m=made: m(hidden), "cuda")
    assert found[variants.OURS, 0.0] < found[variants.PEFT, 0.0]
    assert found[variants.OURS, 0.05] < 0.8 * found[variants.PEFT, 0.05]


@pytest.mark.parametrize(("rows", "inner", "columns", "rank"), [(512, 256, 384, 8), (100, 70, 130, 3)])
def test_a_product_with_a_low_rank_one_added(rows: int, inner: int, columns: int, rank: int) -> None:
    """The kernel that `benchmarks.ways` times."""
    pytest.importorskip("triton")
    from benchmarks.epilogue import product_and

    x, weight, h, b = (
        torch.randn(size, dtype=torch.bfloat16, device="cuda")
        for size in ((rows, inner), (columns, inner), (rows, rank), (columns, rank))
    )
    exact = x.double() @ weight.double().t() + 2 * h.double() @ b.double().t()
    assert error([product_and(x, weight.t(), h, b.t(), 2.0)], [exact.cpu()]) < 4e-3
