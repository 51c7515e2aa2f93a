"""Threads and tasks that call one adapted model: each gets what it would get alone."""

import asyncio
import contextvars
import copy
import pickle
import random
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from families import build, fill, outputs, randomise
from lockstep import in_threads, side_by_side
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_peft import (
    IA3,
    AdaLoRA,
    DoRA,
    LoRA,
    ParallelAdapter,
    PEFTError,
    PEFTMethod,
    PrefixTuning,
    PromptTuning,
    SeriesAdapter,
    VeRA,
    adapter_names,
    disable,
    eject,
    inject,
    merge,
    set_adapter,
)
from lightning_peft.tensors import shadow

CASES: dict[str, tuple[str, PEFTMethod]] = {
    "layers that share an input": ("llama", LoRA(r=2)),
    "cross-attention": ("t5", LoRA(r=2)),
    "fused layers": ("gpt2", LoRA(r=2, fused_parts=["q", "v"])),
    "attention's own weights": ("torch_encoder", LoRA(r=2, target_modules="attention")),
    "experts": ("mixtral", LoRA(r=2, target_modules=["experts.gate_up_proj", "experts.down_proj"])),
    "norms": ("llama", DoRA(r=2)),
    "inputs of layers": ("llama", IA3()),
    "shared projections": ("llama", VeRA(r=4)),
    "singular values": ("llama", AdaLoRA()),
    "residual streams": ("bert", SeriesAdapter(preset="pfeiffer", bottleneck=3)),
    "beside blocks": ("bert", ParallelAdapter(bottleneck=3)),
    "prefixes": ("llama", PrefixTuning(num_virtual_tokens=3)),
    "prompts": ("llama", PromptTuning(num_virtual_tokens=3)),
    "prompts of every layer": ("llama", PromptTuning(num_virtual_tokens=3, every_layer=True)),
    "infixes": ("llama", PromptTuning(num_virtual_tokens=1, num_infix_tokens=2)),
}


def adapted(case: str) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """Return a model, and inputs of two callers."""
    family, method = CASES[case]
    model, inputs = build(family)
    inject(model, method)
    randomise(model)
    both = [inputs, {key: value.roll(1, -1) for key, value in inputs.items()}]
    if case == "infixes":
        for given, end in zip(both, (3, 4), strict=True):
            given["labels"] = given["input_ids"].where(torch.arange(7) > end, -100)
    return model, both


def step(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    result = outputs(model, inputs)
    return [result.detach(), *torch.autograd.grad(result.square().sum(), trained)]


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("case", CASES)
def test_two_threads_get_what_each_gets_alone(case: str, training: bool) -> None:
    model, inputs = adapted(case)

    def call(given: dict[str, Tensor]) -> list[Tensor]:
        with torch.set_grad_enabled(training):
            return step(model, given) if training else [outputs(model, given)]

    alone = [call(given) for given in inputs]
    assert not torch.equal(alone[0][0], alone[1][0])
    for _ in range(3):
        found = side_by_side(*(lambda given=given: call(given) for given in inputs))  # type: ignore[misc]
        for got, expected in zip(found, alone, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(call(inputs[0]), alone[0], strict=True))


# --- adapters of the calling context -------------------------------------------------------------------------------


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
NAMES = ["a", "b", "c", ""]


def several(method: PEFTMethod | None = None) -> nn.Module:
    model = build("sequential")[0]
    for seed, name in enumerate(NAMES[:-1]):
        inject(model, method or LoRA(r=2), name=name)
        fill(model, name, seed)
    return model.requires_grad_(False)


def alone(model: nn.Module) -> dict[str, Tensor]:
    """Return what the model with each of its adapters makes of :data:`X`."""
    found = {}
    for name in NAMES[:-1]:
        set_adapter(model, name)
        found[name] = model(X)
    with disable(model):
        found[""] = model(X)
    set_adapter(model, "a")
    return found


def with_names(model: nn.Module, name: str) -> Tensor:
    with adapter_names(model, [name] * 3):
        return model(X)


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5)


@pytest.mark.parametrize("method", [LoRA(r=2), SeriesAdapter(target_modules=["0", "2"], bottleneck=3), IA3(
    target_modules=["0", "2"], feedforward_modules=[])], ids=["low rank", "bottlenecks", "groups"])  # fmt: skip
def test_each_thread_has_the_adapters_that_it_named(method: PEFTMethod) -> None:
    model = several(method)
    expected = alone(model)
    ab = side_by_side(lambda: with_names(model, "a"), lambda: with_names(model, "b"))
    assert close(ab[0], expected["a"])
    assert close(ab[1], expected["b"])
    # One that names none has the active one.
    bare = side_by_side(lambda: with_names(model, "c"), lambda: model(X))
    assert close(bare[0], expected["c"])
    assert torch.equal(bare[1], expected["a"])

    def base() -> Tensor:
        with disable(model):
            return model(X)

    bases = side_by_side(base, lambda: with_names(model, "b"))
    assert torch.equal(bases[0], expected[""])
    assert close(bases[1], expected["b"])
    assert torch.equal(model(X), expected["a"])


def test_tasks_that_take_turns() -> None:
    model = several()
    expected = alone(model)

    async def request(name: str) -> bool:
        right = True
        with adapter_names(model, [name] * 3):
            for _ in range(5):
                await asyncio.sleep(random.random() / 1000)
                right &= close(model(X), expected[name])
                right &= close(await asyncio.to_thread(model, X), expected[name])
        return right

    async def serve() -> list[bool]:
        return await asyncio.gather(*(request(name) for name in NAMES * 3))

    assert all(asyncio.run(serve()))
    assert torch.equal(model(X), expected["a"])


def test_a_stream_whose_items_are_asked_for_in_contexts_of_their_own_is_told() -> None:
    """As web servers do with a generator; its ``with`` holds in the first of these contexts alone."""
    model = several()

    def stream() -> Iterator[Tensor]:
        with adapter_names(model, ["b"] * 3):
            for _ in range(2):
                yield model(X)

    items = stream()
    for _ in range(2):
        contextvars.copy_context().run(next, items)
    with pytest.raises(PEFTError, match="left in another context than it was entered in"):
        contextvars.copy_context().run(next, items)
    # Nobody is within it any more.
    merge(model)


def serve(model: nn.Module, requests: int, workers: int = 4) -> int:
    """Return how many of the requests to a pool of threads, each with an adapter of its own, were answered right."""
    expected, names = alone(model), random.Random(0).choices(NAMES, k=requests)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(workers) as pool:
            answers = pool.map(lambda name: close(with_names(model, name), expected[name]), names)
            return sum(answers)
    finally:
        sys.setswitchinterval(before)


def test_a_server() -> None:
    assert serve(several(), 200) == 200


@pytest.mark.slow
def test_a_server_for_an_hour_s_worth_of_requests() -> None:
    model = several()
    assert serve(model, 100_000) == 100_000
    assert not any(slot.stand_ins.any for slot in (model[0].peft, model[2].peft))  # type: ignore[union-attr, index]


def test_compiled_without_a_graph_break() -> None:
    """Programs have guards on the thread: of another one they call other adapters."""
    model = several()
    expected = alone(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert close(with_names(compiled, "b"), expected["b"])
    assert close(compiled(X), expected["a"])

    def other() -> None:
        assert close(with_names(compiled, "c"), expected["c"])

    with adapter_names(model, ["b"] * 3):
        in_threads(other)
        assert close(compiled(X), expected["b"])
    for _ in range(20):
        found = in_threads(*(lambda name=name: with_names(compiled, name) for name in "bc"))  # type: ignore[misc]
        assert all(close(y, expected[name]) for y, name in zip(found, "bc", strict=True))


def test_compiled_in_a_thread_that_a_context_was_handed_to() -> None:
    model = several()
    expected = alone(model)
    compiled = torch.compile(model, backend="aot_eager")
    with_names(compiled, "b")

    async def request(name: str) -> tuple[Tensor, Tensor]:
        with adapter_names(model, [name] * 3):
            await asyncio.sleep(0.001)
            return compiled(X), await asyncio.to_thread(compiled, X)

    async def serve() -> list[tuple[Tensor, Tensor]]:
        return await asyncio.gather(request("b"), request("c"))

    for found, name in zip(asyncio.run(serve()), "bc", strict=True):
        assert all(close(answer, expected[name]) for answer in found)


class Deep(torch.autograd.Function):
    """Differentiates ``call`` within a backward pass within a backward pass, …, the last of them in another thread.

    After 60 of them autograd goes on in a thread of its own, as it does for every backward pass on a GPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Callable[[Tensor], Tensor], depth: int) -> Tensor:
        ctx.x, ctx.call, ctx.depth = x.detach(), call, depth
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x = ctx.x.requires_grad_()
        with torch.enable_grad():
            y = Deep.apply(x, ctx.call, ctx.depth - 1) if ctx.depth else ctx.call(x)
        return torch.autograd.grad(y, x, grad)[0], None, None


@pytest.mark.parametrize("reentrant", [False, True])
def test_activations_computed_again(reentrant: bool) -> None:
    model = several().train()

    def gradient(call: Callable[[Tensor], Tensor]) -> Tensor:
        x = X.clone().requires_grad_()
        with adapter_names(model, ["b", "c", ""]):
            call(x).square().sum().backward()
        assert x.grad is not None
        return x.grad

    assert close(gradient(lambda x: checkpoint(model, x, use_reentrant=reentrant)), gradient(model))


def test_what_autograd_s_own_threads_run_is_the_caller_s() -> None:
    model = several()
    expected, found, threads, refused = alone(model), list[Tensor](), set[int](), ""

    def call(x: Tensor) -> Tensor:
        threads.add(threading.get_ident())
        found.append(model(X).detach())
        return x.clone()

    with adapter_names(model, ["b"] * 3):
        for depth in range(58, 63):
            threads.clear()
            try:
                Deep.apply(X.clone().requires_grad_(), call, depth).sum().backward()
            except PEFTError as error:
                refused = str(error)
                break
            if threads != {threading.get_ident()}:
                break
    if torch.__version__ < "2.13" and refused:
        assert "does not tell for whom" in refused
        return
    assert not refused
    assert threads != {threading.get_ident()}
    assert close(found[-1], expected["b"])


def test_a_copy_stands_in_no_context() -> None:
    model = several()
    expected = alone(model)
    with adapter_names(model, ["b"] * 3):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in copies:
        assert torch.equal(twin(X), expected["a"])
        eject(twin)


def test_what_is_written_to_the_model_is_for_one_context_alone() -> None:
    model = build("sequential")[0]
    base = model(X)
    inject(model, LoRA(r=2, target_modules=["0"]), train_also=["2"])
    randomise(model)
    tuned = model(X)

    def disabled() -> Tensor:
        with disable(model):
            return model(X)

    with disable(model):
        assert "Another thread or task is within disable or adapter_names" in _refusal(disabled)
        assert "Another thread or task" in _refusal(lambda: with_names(model, "default"))
        assert "called while another thread or task is within disable" in _refusal(lambda: model(X))
        assert torch.equal(model(X), base)
        assert torch.equal(disabled(), base)
    with adapter_names(model, ["default"] * 3):
        assert "Another thread or task" in _refusal(disabled)
    assert torch.equal(model(X), tuned)
    assert torch.equal(in_threads(disabled)[0], base)


def _refusal(act: Callable[[], Any]) -> str:
    """Return what ``act`` is refused with, in another thread."""

    def attempt() -> str:
        with pytest.raises(PEFTError) as caught:
            act()
        return str(caught.value)

    return str(in_threads(attempt)[0])


@pytest.mark.parametrize("act", [merge, eject, lambda m: set_adapter(m, "b"), lambda m: inject(m, LoRA(), name="d")],
                         ids=["merge", "eject", "switch", "inject"])  # fmt: skip
def test_a_model_that_another_thread_has_adapters_stand_in_of_is_left_alone(act: Callable[[nn.Module], Any]) -> None:
    model = several()
    expected = alone(model)
    with adapter_names(model, ["b"] * 3):
        assert "of whichever thread" in _refusal(lambda: act(model))
    assert close(with_names(model, "c"), expected["c"])


# --- weights that a module reads itself ----------------------------------------------------------------------------


def test_an_interrupted_call_leaves_no_weights_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = adapted("attention's own weights")
    expected = outputs(model, inputs[0])
    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "multi_head_attention_forward", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            outputs(model, inputs[0])
    # Nobody else may read what is left there.
    monkeypatch.setattr(shadow, "_LONGEST_WAIT", 0.01)
    with pytest.raises(PEFTError, match=r"one thread at a time.*interrupted"):
        in_threads(lambda: outputs(model, inputs[0]))
    assert torch.equal(outputs(model, inputs[0]), expected)
    assert torch.equal(in_threads(lambda: outputs(model, inputs[0]))[0], expected)
    assert not any(key.endswith("weight") for module in model.modules() for key in vars(module))


def _interrupt(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


def test_a_failing_call_lets_the_next_thread_in() -> None:
    model, inputs = adapted("attention's own weights")
    expected = outputs(model, inputs[0])
    with pytest.raises(AssertionError):
        model(torch.randn(2, 5, 31))
    assert torch.equal(in_threads(lambda: outputs(model, inputs[0]))[0], expected)


# --- nn.DataParallel -----------------------------------------------------------------------------------------------


def test_replicas_in_threads_are_refused() -> None:
    """As ``torch.nn.parallel.replicate`` makes them, which asks for several GPUs."""
    model = several()
    with pytest.raises(PEFTError, match=r"DataParallel.*ddp"):
        [module._replicate_for_data_parallel() for module in model.modules()]
