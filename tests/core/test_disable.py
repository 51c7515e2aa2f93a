"""The base model for a while."""

from typing import Any

import pytest
import torch
from families import build, outputs, randomise

from lightning_peft import IA3, BitFit, DoRA, LoRA, PEFTError, PEFTMethod, adapter_state_dict, disable, inject, merge

CASES: dict[str, tuple[list[PEFTMethod], dict[str, Any]]] = {
    "adapters": ([DoRA(r=2)], {}),
    "before the host": ([IA3()], {}),
    "parameters of the base": ([LoRA(r=2, target_modules=["query"]), BitFit()], {}),
    "whole modules": ([LoRA(r=2, target_modules=["query"])], {"train_also": ["classifier"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_the_base_models_and_come_back(case: str) -> None:
    methods, options = CASES[case]
    model, inputs = build("bert")
    base = outputs(model, inputs)
    inject(model, methods, **options)
    randomise(model)
    tuned, state = outputs(model, inputs), {k: v.clone() for k, v in adapter_state_dict(model).items()}
    assert not torch.equal(tuned, base)
    with disable(model):
        assert torch.equal(outputs(model, inputs), base)
    assert torch.equal(outputs(model, inputs), tuned)
    with pytest.raises(ZeroDivisionError), disable(model):
        _ = 1 / 0
    assert torch.equal(outputs(model, inputs), tuned)
    assert all(torch.equal(adapter_state_dict(model)[key], tensor) for key, tensor in state.items())


def test_a_merged_or_plain_model_is_refused() -> None:
    model, _ = build("llama")
    with pytest.raises(PEFTError, match="has no adapters"), disable(model):
        pass
    inject(model, LoRA(r=2))
    merge(model)
    with pytest.raises(PEFTError, match=r"disable the adapters.*unmerge"), disable(model):
        pass
