"""What the report of the judges says: bounds where no other test has them, and that it knows every method."""

import pytest
from all_methods import OURS
from families import ALL_FAMILIES

from judges import hf_peft, report
from lightning_peft.formats.counterpart import for_method


@pytest.mark.parametrize("name", ["lora", "ia3", "layer_norm_tuning"])
def test_float64_is_that_of_peft(name: str) -> None:
    """Other methods have these bounds in the tests of their own."""
    logits, gradients, narrow = hf_peft.peft_row(name)
    assert max(logits, gradients) <= 1e-9
    assert narrow <= 1e-5


def test_every_method_that_peft_has_is_judged_by_it() -> None:
    judged = {type(method) for cases in hf_peft.of_peft().values() for _, method in cases}
    assert judged == {cls for cls in OURS.values() if for_method(cls())}


def test_the_matrix_has_every_cell() -> None:
    for name, (passed, refused) in report.matrix().items():
        assert passed > 0, name
        assert passed + refused.total() == len(ALL_FAMILIES)
    assert report.lines().keys() == OURS.keys()
