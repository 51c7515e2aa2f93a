"""Memory that tensors have in common, and a limit on how much is asked for."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_peft import PEFTError
from lightning_peft.tensors.allowance import Allowance
from lightning_peft.tensors.memory import overlapping

BLOCK = torch.zeros(6, 4)


@pytest.mark.parametrize(
    ("tensors", "common"),
    [
        ([BLOCK[:3], BLOCK[3:]], []),
        ([BLOCK[:3], BLOCK[2:]], [0, 1]),
        ([BLOCK, BLOCK[1], BLOCK[4]], [0, 1, 2]),
        ([BLOCK[:1], BLOCK[1:4], BLOCK[2:3]], [1, 2]),
        ([BLOCK.view(-1)[:5], BLOCK.view(-1)[4:9], BLOCK.view(-1)[9:]], [0, 1]),
        ([BLOCK[:, :2], torch.zeros(6, 4)], []),
        ([BLOCK.T, BLOCK.view(-1)[20:]], [0, 1]),
        ([BLOCK[:0], BLOCK], []),
        ([BLOCK.to("meta"), BLOCK.to("meta")], []),
        ([BLOCK.to_sparse(), BLOCK], []),
        ([BLOCK], []),
        ([], []),
    ],
)
def test_memory_in_common(tensors: list[Tensor], common: list[int]) -> None:
    for order in (tensors, tensors[::-1]):
        assert overlapping(order) == {id(tensors[position]) for position in common}


@pytest.mark.parametrize("make", [torch.zeros, torch.ones, torch.empty])
def test_so_many_elements_may_be_made(make: Callable[..., Tensor]) -> None:
    with Allowance(20, "x"):
        make(2, 5)
        make((10,))
        make(4, 4, device="meta")
        torch.arange(100)
        with pytest.raises(PEFTError, match=r"x: its configuration asks for adapters of the shape \[1\]"):
            make(1)
    make(100)


def test_one_that_is_too_large_is_not_made() -> None:
    with Allowance(10, "x"), pytest.raises(PEFTError, match=r"\[10000000000, 10000\]"):
        torch.empty(size=(10**10, 10**4))
