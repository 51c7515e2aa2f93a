"""Whether a tensor has another value than it had."""

import math

import pytest
import torch
from torch import Tensor

from lightning_peft.core.registry import differs

ONE = torch.tensor([1.0, 1 / 3])


@pytest.mark.parametrize(
    ("tensor", "before", "expected"),
    [
        (ONE, ONE.clone(), False),
        (ONE, torch.tensor([1.0, 2.0]), True),
        (ONE.bfloat16(), ONE, False),
        (ONE, ONE.reshape(1, 2), True),
        (ONE, torch.tensor([1.0, 1 / 3, 2.0]), True),
        (ONE, ONE.to("meta"), False),
        (ONE.to("meta"), ONE, False),
        (ONE.to("meta"), torch.zeros(3), True),
        (torch.tensor([math.nan]), torch.tensor([math.nan]), False),
        (torch.tensor([1]), torch.tensor([2]), True),
    ],
)
def test_another_value(tensor: Tensor, before: Tensor, expected: bool) -> None:
    assert differs(tensor, before) is expected
