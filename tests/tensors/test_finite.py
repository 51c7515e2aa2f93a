"""NaN and infinity are found wherever they are, and nothing else is taken for them."""

import math

import pytest
import torch
from torch import Tensor

from lightning_peft.tensors.finite import is_suspect, not_finite

BAD = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_tensor_is_named(value: float, dtype: torch.dtype) -> None:
    bad = torch.ones(3, dtype=dtype)
    bad[1] = value
    tensors = {"good": torch.ones(2, dtype=dtype), "bad": bad, "whole numbers": torch.ones(2, dtype=torch.long)}
    assert not_finite(tensors) == ["bad"]
    assert bool(is_suspect([bad]))


@pytest.mark.parametrize("tensor", [torch.full((4,), 6e4).half(), torch.zeros(2, 2).to_sparse(), torch.zeros(0)])
def test_good_tensors_are_good(tensor: Tensor) -> None:
    assert not bool(is_suspect([tensor]))
    assert not_finite({"a": tensor}) == []


def test_what_is_large_is_looked_at_again() -> None:
    large = torch.full((4,), 1e30)
    assert bool(is_suspect([large]))
    assert not_finite({"a": large}) == []


def test_sparse_tensors_are_looked_into() -> None:
    assert not_finite({"a": torch.tensor([0.0, math.nan]).to_sparse()}) == ["a"]
