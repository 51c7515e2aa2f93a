"""Bottleneck and Compacter adapters against what AdapterHub's package computed."""

import pytest

from judges.adapterhub import CASES, base, differences, stored, under


@pytest.mark.parametrize(("family", "case"), CASES)
def test_logits_and_gradients_are_theirs(family: str, case: str) -> None:
    plain = base(family)(**under(f"{family}/input/")).logits
    reference = stored()[f"{family}/{case}/logits"]
    assert (plain - reference).abs().max() > 1e-2
    found = differences(family, case)
    assert found["logits"] <= 1e-9
    assert found["gradients"] <= 1e-9
    assert found["float32"] <= 1e-4 * float(reference.abs().max())
