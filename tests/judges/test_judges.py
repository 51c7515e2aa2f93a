"""What ``judges.py`` prints: bounds where no other test has them, and that it knows every method."""

import judges
import pytest
from test_methods import OURS

from lightning_peft.formats.counterpart import for_methods


@pytest.mark.parametrize("name", ["lora", "ia3", "layer_norm_tuning"])
def test_float64_is_that_of_peft(name: str) -> None:
    """Other methods have these bounds in the tests of their own."""
    logits, gradients, narrow = judges.peft_row(name)
    assert max(logits, gradients) <= 1e-9
    assert narrow <= 1e-5


def test_every_method_that_peft_has_is_judged_by_it() -> None:
    judged = {type(method) for cases in judges.of_peft().values() for _, method in cases}
    assert judged == {cls for cls in OURS.values() if for_methods([cls()])}


def test_the_matrix_has_every_cell() -> None:
    for name, (passed, refused) in judges.matrix().items():
        assert passed > 0, name
        assert passed + refused.total() == len(judges.ALL_FAMILIES)
    assert judges.lines().keys() == OURS.keys()
