"""Bottlenecks on single modules against the papers' equations in float64: outputs, gradients, every activation."""

import pytest
import torch
from judges.equations import CASES, differences
from torch import nn

from lightning_peft import ParallelAdapter, inject


@pytest.mark.parametrize("case", CASES)
def test_the_equation_and_its_gradients(case: str) -> None:
    assert max(differences(case).values()) <= 1e-12
    assert max(differences(case, torch.float32).values()) <= 1e-5


def test_dropout_zeroes_the_adapter_s_input_alone() -> None:
    model = nn.Sequential(nn.Linear(6, 8)).double()
    base = model(torch.ones(1, 6, dtype=torch.float64))
    inject(model, ParallelAdapter(bottleneck=4, dropout=0.5, activation="identity", target_modules=["0"], bias=False))
    nn.init.ones_(model[0].peft["default"].up)
    x = torch.ones(4000, 6, dtype=torch.float64)
    delta = model.train()(x) - base
    expected = model.eval()(x) - base
    assert (delta.mean(0) - expected[0]).abs().max() < 0.1 * expected.abs().max()
    assert delta.std(0).min() > 0
