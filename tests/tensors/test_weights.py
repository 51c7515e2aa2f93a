"""What is told of a weight: its shape, its layout, whether it holds codes, whether it is another's equal."""

import math

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft.tensors import packed, weights

NAN = torch.tensor([1.0, math.nan])


@pytest.mark.parametrize(
    ("module", "shape", "transposed"),
    [
        (nn.Linear(3, 5), (3, 5), False),
        (Conv1D(5, 3), (3, 5), True),
        (nn.Embedding(7, 4), (7, 4), True),
        (nn.Conv1d(4, 6, 3), (12, 6), False),
        (nn.Conv2d(4, 6, (3, 2), groups=2), (12, 6), False),
        (nn.Conv3d(2, 6, 2), (16, 6), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_features_and_matrices(module: nn.Module, shape: tuple[int, int], transposed: bool) -> None:
    assert weights.features(module) == shape
    assert weights.is_transposed(module) is transposed
    matrix = weights.read_matrix(module)
    assert tuple(matrix.shape) == shape[::-1]
    assert torch.equal(weights.as_stored(module, matrix, torch.float32), weights.weight_of(module))


def test_what_is_linear_and_what_is_a_convolution() -> None:
    assert [weights.is_linear(m) for m in (nn.Linear(1, 1), Conv1D(1, 1), nn.Embedding(1, 1))] == [True, True, False]
    assert [weights.is_conv(m) for m in (nn.Conv1d(1, 1, 1), nn.ConvTranspose1d(1, 1, 1))] == [True, False]


@pytest.mark.parametrize(
    ("dtype", "codes"),
    [
        (torch.float64, False),
        (torch.float16, False),
        (torch.bfloat16, False),
        (torch.float8_e4m3fn, True),
        (torch.int8, True),
        (torch.uint8, True),
        (torch.bool, True),
    ],
)
def test_codes_of_quantisers(dtype: torch.dtype, codes: bool) -> None:
    assert packed.holds_codes(torch.zeros(2, dtype=dtype)) is codes
    layer = nn.Linear(2, 2)
    layer._parameters["weight"] = nn.Parameter(torch.zeros(2, 2, dtype=dtype), requires_grad=False)
    assert packed.is_packed(layer) is codes
    assert not packed.is_packed(nn.ReLU())


@pytest.mark.parametrize(
    ("given", "made"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_adapters_are_never_narrower_than_float32(given: torch.dtype, made: torch.dtype) -> None:
    layer = nn.Linear(2, 2, dtype=given)
    assert weights.tensor_options(layer) == {"dtype": made, "device": torch.device("cpu")}
    assert weights.widened(layer.weight).dtype == made
    several = nn.ParameterList([nn.Parameter(torch.zeros(1, dtype=torch.int8), requires_grad=False), layer.weight])
    assert weights.tensor_options(several)["dtype"] == made
    assert weights.tensor_options(nn.ReLU()) == {"dtype": torch.float32}


def sparse(*values: float, layout: torch.layout = torch.sparse_coo) -> Tensor:
    return torch.tensor([values]).to_sparse(layout=layout)


LAYOUTS = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (torch.ones(2), torch.ones(2), True),
        (torch.ones(2), torch.tensor([1.0, 2.0]), False),
        (NAN, NAN.clone(), True),
        (NAN, torch.tensor([math.nan, 1.0]), False),
        (torch.zeros(0), torch.zeros(0), True),
        (torch.zeros(1, 2), torch.zeros(2, 1), False),
        (sparse(0, 1), torch.tensor([[0.0, 1.0]]), False),
        *((sparse(0, 1, layout=layout), sparse(0, 1, layout=layout), True) for layout in LAYOUTS),
        *((sparse(0, 1, layout=layout), sparse(0, 2, layout=layout), False) for layout in LAYOUTS),
        *((sparse(0, 1, layout=layout), sparse(1, 0, layout=layout), False) for layout in LAYOUTS),
        *((sparse(0, 1, layout=layout), sparse(1, 1, layout=layout), False) for layout in LAYOUTS),
    ],
)
def test_equal_values(one: Tensor, other: Tensor, same: bool) -> None:
    assert weights.is_same(one, other) is same
