"""What cannot be done to a model is said in words: what was given, and what to do instead. Nothing has changed then."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft import BitFit, LoRA, PEFTError, inject
from lightning_peft.core.view import ModelView
from lightning_peft.operations.mergeable import refuse_unloading
from lightning_peft.operations.to_lora import difference_to_lora


def base(width: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 4, bias=False))


def with_nan(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter("0.weight")[0, 0] = float("nan")
    return other


WRONG: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "all that is selected is trained whole": (
        lambda m: inject(m, LoRA(r=2, target_modules=["0"]), train_also=["0"]),
        r"LoRA has nothing to do in this Sequential: train_also trains every module that it selects whole",
    ),
    "no biases": (
        lambda m: inject(m[2:], BitFit()),
        r"this Sequential has no biases\. BitFit\(create_missing=True\) gives",
    ),  # type: ignore[index]
    "nothing in it": (
        lambda m: inject(m, LoRA(r=2, target_modules=["0"]), train_also=["1"]),
        r"train_also: '1' \(Tanh\) has no parameters to train",
    ),
    "models of two forms": (lambda m: difference_to_lora(m, base(5), rank=1), r"differ in the form of '0\.weight'"),
    "equal models": (lambda m: difference_to_lora(m, copy.deepcopy(m), rank=1), r"there is nothing to make a LoRA of"),
    "a model with NaN": (
        lambda m: difference_to_lora(m, with_nan(m), rank=1),
        r"The change of '0' holds NaN or infinity",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_it_is_said_and_nothing_changes(kind: str) -> None:
    act, words = WRONG[kind]
    model, before = base(), base().state_dict()
    with pytest.raises(PEFTError, match=words):
        act(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_run_does_not_leave_a_plain_model_of_several_adapters() -> None:
    model = base()
    for name in "ab":
        inject(model, LoRA(r=2, target_modules=["0"]), name=name)
    with pytest.raises(PEFTError, match=r"the model has several adapters, a, b"):
        refuse_unloading(ModelView(model))
