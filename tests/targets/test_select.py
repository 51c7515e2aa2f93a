"""Which modules patterns mean in a model."""

import pytest
from torch import nn

from lightning_peft import LoRA, PEFTError, inject
from lightning_peft.core.view import ModelView


def twice() -> nn.Module:
    """Return a model that has one part under two names."""
    model = nn.Module()
    model.body = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    model.again = model.body
    return model


@pytest.mark.parametrize(
    ("pattern", "found"),
    [("again.0", ["body.0"]), ("again.*", ["body.0", "body.2"]), ("body.0", ["body.0"]), ("2", ["body.2"])],
)
def test_a_module_is_found_by_each_of_its_names(pattern: str, found: list[str]) -> None:
    model = twice()
    inject(model, LoRA(r=1, target_modules=[pattern]))
    assert [name for name, _, _ in ModelView(model).slots] == found


def test_another_name_of_what_cannot_be_adapted_is_none() -> None:
    with pytest.raises(PEFTError, match=r"'again\.1' matches"):
        inject(twice(), LoRA(r=1, target_modules=["again.1"]))
