"""Initial values: of a seed and a name alone, whatever else draws, wherever the parameter is."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_peft.tensors.seeding import fill, generator_of, parameters_left_empty


def draw(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.normal_(generator=generator)


def filled(seed: int = 1, name: str = "a", dtype: torch.dtype = torch.float32) -> Tensor:
    tensor = torch.zeros(4, dtype=dtype)
    fill(tensor, seed, name, draw)
    return tensor


def test_seed_and_name_alone_decide() -> None:
    before = torch.get_rng_state()
    first = filled()
    torch.randn(3)
    assert torch.equal(filled(), first)
    assert not torch.equal(filled(seed=2), first)
    assert not torch.equal(filled(name="b"), first)
    assert not torch.equal(filled(seed=11, name="1"), filled(seed=1, name="11"))
    torch.set_rng_state(before)


def test_a_narrower_dtype_has_the_same_values_rounded() -> None:
    assert torch.equal(filled(dtype=torch.bfloat16), filled().bfloat16())


def test_the_values_are_those_of_earlier_releases() -> None:
    """A file that lacks what is drawn anew, as VeRA's projections, depends on them: half of blake2b's eight bytes."""
    assert generator_of(0, "net.0.lora_A").initial_seed() == 5474712935904245289


@pytest.mark.parametrize(
    ("make", "value"),
    [(nn.Parameter, 0.0), (lambda tensor: tensor, None)],
    ids=["a parameter", "a buffer"],
)
def test_what_a_file_is_about_to_give_is_not_drawn(make: Callable[[Tensor], Tensor], value: float | None) -> None:
    tensor = make(torch.zeros(4))
    with parameters_left_empty():
        fill(tensor, 1, "a", draw)
    assert torch.equal(tensor, filled() if value is None else torch.zeros(4))
    fill(tensor, 1, "a", draw)
    assert torch.equal(tensor, filled())


def test_what_has_no_memory_is_left_alone() -> None:
    tensor = torch.empty(4, device="meta")
    fill(tensor, 1, "a", draw)
    assert tensor.is_meta
