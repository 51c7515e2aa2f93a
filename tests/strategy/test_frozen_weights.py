"""A write to a frozen weight is noticed however the weight lies in memory; the judge is what was written."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import LoRA, inject
from lightning_peft.core.view import ModelView
from lightning_peft.strategy.frozen_weights import FrozenWeights

WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "plain": lambda: torch.randn(4, 6),
    "of an odd number of bytes": lambda: torch.randn(3, 3).half(),
    "at an odd place": lambda: torch.randn(5)[1:],
    "with steps": lambda: torch.randn(10)[::2],
    "columns with steps": lambda: torch.randn(4, 6)[:, ::2],
    "turned": lambda: torch.randn(3, 5).T,
    "expanded": lambda: torch.randn(1).expand(6),
    "complex": lambda: torch.randn(3, dtype=torch.complex64),
    "conjugate": lambda: torch.randn(3, dtype=torch.complex64).conj(),
    "bool": lambda: torch.zeros(11, dtype=torch.bool),
    "of eight bits": lambda: torch.randn(16).to(torch.float8_e4m3fn),
    "one number": lambda: torch.tensor(0.5),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_write_is_noticed(name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_parameter("own", nn.Parameter(WEIGHTS[name](), requires_grad=False))
    inject(model, LoRA(r=2, target_modules=["0"]))
    frozen = FrozenWeights(ModelView(model))
    assert frozen.changed(ModelView(model)) == set()
    own = model.get_parameter("own").data
    other = ~own if own.dtype == torch.bool else (own.to(torch.complex128) + 1).to(own.dtype)
    own[..., :1].copy_(other[..., :1]) if own.dim() else own.copy_(other)
    assert frozen.changed(ModelView(model)) == {"own"}
