"""Ctrl-C, or no memory, at any line of an operation: the model is as before or as after, or the next call mends it."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import pytest
import torch
from families import build, randomise
from torch import nn
from unchanged import snapshot

import lightning_peft
from lightning_peft import BitFit, LoRA, eject, inject, merge, set_adapter, unmerge
from lightning_peft.operations.rest import freeze_rest

PACKAGE = lightning_peft.__path__[0]
# Weights that an adapter replaces, and a linear layer; and two layers, of which the first has an adapter already.
ATTENTION = LoRA(r=2, target_modules=["0.self_attn", "0.linear1"])
ANOTHER = LoRA(r=2, target_modules=["0.linear1", "1.linear2"])


class Interruption:
    """Raises at the line number ``at`` that the package runs within it."""

    def __init__(self, at: int) -> None:
        self.left, self.came = at, False

    def __enter__(self) -> "Interruption":
        self._before = sys.gettrace()  # of who measures which lines run
        sys.settrace(self._trace)
        return self

    def __exit__(self, kind: Any, *_: Any) -> bool:
        sys.settrace(self._before)
        return bool(self.came and kind in (KeyboardInterrupt, MemoryError))

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                self.came = True
                sys.settrace(None)
                raise MemoryError if frame.f_lineno % 2 else KeyboardInterrupt
        return self._trace


@dataclass
class Case:
    """An operation on a model, and what has to hold when it was interrupted."""

    prepare: Callable[[], nn.Module]
    act: Callable[[nn.Module], Any]
    mend: Callable[[nn.Module], Any] = field(default=lambda model: None)
    """The next call, after which the model is as :attr:`act` or nothing would have left it."""


def encoder(**options: Any) -> nn.Module:
    model = plain()
    inject(model, ATTENTION, **options)
    randomise(model)
    return model


def plain() -> nn.Module:
    return build("torch_encoder")[0].layers  # type: ignore[return-value]


def tied() -> nn.Module:
    model, _ = build("gpt2")
    inject(model, LoRA(r=2, target_modules=["lm_head", "h.0.attn.c_attn"]))
    randomise(model)
    return model


def merged() -> nn.Module:
    model = encoder(train_also=["1.norm2"])
    merge(model)
    return model


def biased() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    inject(model, BitFit(create_missing=True))
    randomise(model)
    return model


def two() -> nn.Module:
    model = encoder()
    inject(model, ANOTHER, name="b")
    return model


def part() -> nn.Module:
    model = plain()
    inject(model[0], LoRA(r=2, target_modules=["linear1"]))  # type: ignore[index]
    return model


CASES: dict[str, Case] = {
    "merge": Case(encoder, merge),
    "merge tied weights": Case(tied, merge),
    "merge a new bias": Case(biased, merge),
    "unmerge": Case(merged, unmerge),
    "unmerge tied weights": Case(lambda: _and(tied(), merge), unmerge),
    "eject": Case(lambda: encoder(train_also=["1.norm2"]), eject),
    "eject merged": Case(merged, eject),
    "inject": Case(plain, lambda m: inject(m, ATTENTION, train_also=["1.norm2"])),
    "inject another": Case(encoder, lambda m: inject(m, ANOTHER, name="b")),
    "inject around a part": Case(part, lambda m: freeze_rest(m, ["1.norm2"])),
    "switch": Case(two, lambda m: set_adapter(m, "b")),
    "merge for good": Case(encoder, lambda m: merge(m, unload=True), lambda m: merge(m, unload=True)),
}  # fmt: skip


def _and(model: nn.Module, act: Callable[[nn.Module], Any]) -> nn.Module:
    act(model)
    return model


def seen(model: nn.Module) -> dict[str, Any]:
    """Return what there is to see of a model, without identities."""
    found = snapshot(model)
    return {
        "classes": {name: kind for name, (_, kind) in found["classes"].items()},
        "attributes": {name: sorted(keys) for name, keys in found["attributes"].items()},
        "hooks": {
            name: [len(vars(module)[kind]) for kind in vars(module) if kind.endswith("_hooks")]
            for name, module in model.named_modules()
        },
        "state": {name: value for name, (_, value) in found["state"].items()},
        "requires_grad": found["requires_grad"],
        "training": found["training"],
        "running": {
            name: module.active_adapter is not None and module.merged is None
            for name, module in model.named_modules()
            if hasattr(module, "active_adapter")
        },
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


def lines(case: Case) -> int:
    """Return how many lines of the package the operation runs."""
    model, counter = case.prepare(), Interruption(10**9)
    with counter:
        case.act(model)
    return 10**9 - counter.left


def damaged(case: Case, at_most: int) -> tuple[int, list[int]]:
    """Return at how many lines an interrupt was tried, spread evenly, and at which it did damage."""
    before, after = seen(case.prepare()), seen(_and(case.prepare(), case.act))
    assert not same(before, after)
    number, bad = lines(case), []
    tried = range(1, number + 1, max(1, number // at_most))
    for at in tried:
        model = case.prepare()
        with Interruption(at) as interruption:
            case.act(model)
        if not interruption.came:  # some lines run only once in a process
            continue
        if same(seen(model), before) or same(seen(model), after):
            continue
        try:
            case.mend(model)
            mended = same(seen(model), before) or same(seen(model), after)
        except Exception:
            mended = False
        if not mended:
            bad.append(at)
    return len(tried), bad


@pytest.mark.parametrize("name", CASES)
def test_an_interrupt_does_no_damage(name: str) -> None:
    _, bad = damaged(CASES[name], at_most=20)
    assert not bad


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_an_interrupt_at_any_line_does_no_damage(name: str) -> None:
    tried, bad = damaged(CASES[name], at_most=10**6)
    print(f"{name}: interrupted at {tried} lines")
    assert not bad
