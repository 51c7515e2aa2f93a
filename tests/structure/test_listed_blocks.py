"""The blocks that ``layers`` names."""

from collections.abc import Sequence

import pytest
from torch import nn

from lightning_peft import PEFTError
from lightning_peft.core.view import ModelView
from lightning_peft.structure.layers import in_layers


class Two(nn.Module):
    """Lists of four blocks and of two."""

    def __init__(self) -> None:
        super().__init__()
        self.long = nn.ModuleList([nn.Sequential(nn.Linear(1, 1)) for _ in range(4)])
        self.short = nn.ModuleList([nn.Linear(1, 1) for _ in range(2)])
        self.head = nn.Linear(1, 1)


NAMES = [*(f"long.{i}.0" for i in range(4)), "short.0", "short.1.weight", "head"]


@pytest.mark.parametrize(
    ("layers", "long", "short"),
    [
        ([0, 3], [0, 3], [0]),
        ([1], [1], [1]),
        ("1:", [1, 2, 3], [1]),
        (":1", [0], [0]),
        ("-1:", [3], [1]),
        ("2:9", [2, 3], []),
        ("::2", [0, 2], [0]),
        (" 1 : 2 ", [1], [1]),
        ("::-1", [0, 1, 2, 3], [0, 1]),
    ],
)
def test_blocks_by_their_numbers(layers: str | Sequence[int], long: list[int], short: list[int]) -> None:
    expected = [*(f"long.{i}.0" for i in long), *(NAMES[4 + i] for i in short)]
    assert in_layers(ModelView(Two()), NAMES, layers) == expected
    assert in_layers(ModelView(Two()), NAMES, None) == NAMES


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([4], r"there is no layer \[4\]. Layers there are: {'long': 4, 'short': 2}"),
        ([0, -1], r"there is no layer \[-1\]"),
        ("7:", "selects no layer"),
        ([], "selects no layer"),
        ("1", "is no slice"),
        ("a:b", "is no slice"),
        ("1:2:3:4", "is no slice"),
    ],
)
def test_blocks_that_are_not_there(layers: str | Sequence[int], words: str) -> None:
    with pytest.raises(PEFTError, match=words):
        in_layers(ModelView(Two()), NAMES, layers)


def test_a_model_without_blocks() -> None:
    with pytest.raises(PEFTError, match=r"layers=\[0\] was given, but the model has no list of blocks"):
        in_layers(ModelView(nn.Linear(1, 1)), [""], [0])
