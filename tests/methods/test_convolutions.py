"""Which side of a convolution IA3 rescales: HF PEFT as the judge, in float64."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import strongly
from torch import Tensor, nn

from lightning_peft import IA3, PEFTError, inject, load_adapter, save_adapter


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max()


class Pair(nn.Module):
    """Two convolutions and a linear layer, of names that end alike."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.preconv = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.preconv(self.conv(x)).tanh().mean((2, 3)))


def pair() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Pair().double()


@pytest.mark.parametrize("inputs", [["conv"], ["preconv"], ["conv", "preconv"], ["head", "conv"], ["head"]])
def test_which_side_ia3_rescales(inputs: list[str], tmp_path: Path) -> None:
    """HF PEFT takes every name that ends so, and its vectors of both sides of a convolution have one shape."""
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model, loaded = pair(), pair()
    exactly = [f"re:{name}" for name in inputs]
    inject(model, IA3(target_modules=["re:conv", "preconv", "head"], feedforward_modules=exactly))
    strongly(model)
    save_adapter(model, tmp_path / "ours")
    judge = peft.PeftModel.from_pretrained(pair(), tmp_path / "ours", autocast_adapter_dtype=False)
    assert_near(model(x), judge(x))
    judge.save_pretrained(tmp_path / "theirs")
    load_adapter(loaded, tmp_path / "theirs")
    assert torch.equal(loaded(x), model(x))


def test_the_other_side_of_a_convolution_is_refused(tmp_path: Path) -> None:
    """What is loaded into a model in which the other side is rescaled, by a vector of the same shape."""
    model, other = pair(), pair()
    inject(model, IA3(target_modules=["preconv"]))
    save_adapter(model, tmp_path / "adapter")
    inject(other, IA3(target_modules=["preconv"], feedforward_modules=["preconv"]))
    with pytest.raises(PEFTError, match=r"preconv\.peft\.default\.ia3_l"):
        load_adapter(other, tmp_path / "adapter")
