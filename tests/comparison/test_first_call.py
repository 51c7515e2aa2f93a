"""The call whose latency is measured is made again as it was made first."""

from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from lightning_peft.comparison.measuring import FirstCall

TOLD: ContextVar[str] = ContextVar("told", default="nothing")


class Told(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.calls: list[Any] = []

    def forward(self, x: int, *, y: int) -> None:
        self.calls.append((x, y, TOLD.get()))


def test_a_call_is_made_again_with_what_its_context_had_said() -> None:
    """Labels of infix tokens reach a model so; what is said by now, such as that adapters are disabled, goes first."""
    model, first = Told(), FirstCall()
    token = TOLD.set("then")
    with first.watching(model):
        model(1, y=2)
        model(3, y=4)
    TOLD.reset(token)
    token = TOLD.set("in another stage")
    with first.watching(model):
        model(5, y=6)
    TOLD.reset(token)
    model.calls.pop()
    first.again()
    token = TOLD.set("now")
    first.again()
    TOLD.reset(token)
    assert model.calls == [(1, 2, "then"), (3, 4, "then"), (1, 2, "then"), (1, 2, "now")]
    assert TOLD.get() == "nothing"


def test_it_is_that_of_the_outermost_module() -> None:
    """Virtual tokens are made in a hook of the model that they stand before."""
    model, first = nn.Sequential(nn.Linear(2, 2)), FirstCall()
    model.register_forward_pre_hook(lambda module, args: module[0](*args))
    with first.watching(model):
        model(torch.zeros(1, 2))
    assert first.of is not None
    assert first.of[0] is model
