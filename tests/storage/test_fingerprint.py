"""Which base an adapter belongs to: frozen parts that are not adapted count too, rounding and new rows do not."""

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from lightning_peft import IA3, LoRA, PEFTError, inject, merge
from lightning_peft.core.view import ModelView
from lightning_peft.storage.fingerprint import describe_base, refuse_other_base


def model(layers: int = 2, tokens: int = 20, head: int = 1, train_also: Sequence[str] = ()) -> nn.Module:
    """One with adapters, frozen embeddings, norms of larger values, and a head drawn from the seed ``head``."""
    torch.manual_seed(0)
    body = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(8, 8), "up": nn.Linear(8, 8)}) for _ in range(layers))
    with torch.no_grad():
        rows = torch.randn(50, 8)[:tokens]
    embedding = nn.Embedding.from_pretrained(rows.clone())
    norm = nn.LayerNorm(8)
    nn.init.constant_(norm.weight, 9.0)
    torch.manual_seed(head)
    made = nn.ModuleDict({"head": nn.Linear(8, 3), "embedding": embedding, "body": body, "norm": norm})
    nn.init.normal_(made["head"].weight, std=0.02)
    inject(made, LoRA(r=2, target_modules=["q"]), train_also=train_also)
    return made


def check(here: nn.Module, there: nn.Module) -> None:
    refuse_other_base(ModelView(here), describe_base(ModelView(there)), "The file")


@pytest.mark.parametrize("layers", [2, 200])
def test_another_frozen_head_is_refused(layers: int) -> None:
    """Also in a model of many layers, of which only some are looked at."""
    check(model(layers), model(layers))
    with pytest.raises(PEFTError, match=r"beside another 'head'\. It was frozen.*train_also=\['head'\]"):
        check(model(layers), model(layers, head=2))


def test_the_last_of_many_layers_is_looked_at() -> None:
    def layers(seed: int) -> nn.Module:
        torch.manual_seed(0)
        made = nn.Sequential(*(nn.Linear(4, 4) for _ in range(200)))
        torch.manual_seed(seed)
        made.append(nn.Linear(4, 2))
        inject(made, LoRA(r=2, target_modules=["0"]))
        return made

    check(layers(1), layers(1))
    with pytest.raises(PEFTError, match="beside another '200'"):
        check(layers(1), layers(2))


def test_a_head_that_is_trained_is_in_the_file() -> None:
    check(model(train_also=["head"]), model(head=2, train_also=["head"]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_no_other_base(dtype: torch.dtype) -> None:
    check(model().to(dtype), model())
    check(model(), model().to(dtype))


def test_more_tokens_are_no_other_base() -> None:
    check(model(tokens=23), model())
    check(model(), model(tokens=23))


def test_merged_weights_are_taken_as_they_were() -> None:
    merged = model()
    for name, parameter in merged.named_parameters():
        if "lora" in name:
            nn.init.normal_(parameter)
    merge(merged)
    check(merged, model())
    check(model(), merged)


def test_a_description_of_adapted_weights_alone_is_read() -> None:
    """As earlier releases wrote it."""
    older = describe_base(ModelView(model(head=2)))
    del older["frozen"], older["others"]
    refuse_other_base(ModelView(model()), older, "The file")


def test_what_is_loaded_as_well_does_not_count() -> None:
    held = {"head.weight", "head.bias"}
    refuse_other_base(ModelView(model()), describe_base(ModelView(model(head=2))), "The file", held=held)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        (nn.Linear(8, 8), "part.bias"),
        (nn.LayerNorm(8), "part.weight"),
        (nn.BatchNorm1d(8), "part.bias"),
        (nn.GRU(8, 4), "part.weight_ih_l0"),
        (nn.ParameterList([nn.Parameter(torch.zeros(1, 5, 8))]), "part.0"),
        (nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 1)), "part.parametrizations.weight.original0"),
    ],
    ids=lambda found: type(found).__name__ if isinstance(found, nn.Module) else found,
)
def test_another_frozen_parameter_is_refused(part: nn.Module, name: str) -> None:
    """Whatever it is called, and however many dimensions it has."""

    def around(change: float) -> nn.Module:
        torch.manual_seed(0)
        made = nn.ModuleDict({"q": nn.Linear(8, 8), "part": copy.deepcopy(part)})
        with torch.no_grad():
            made.get_parameter(name).add_(change)
        inject(made, LoRA(r=2, target_modules=["q"]))
        return made

    check(around(0.1), around(0.1))
    with pytest.raises(PEFTError, match=rf"beside another {name!r}"):
        check(around(0.1), around(0.3))


@pytest.mark.parametrize("merged", ["here", "there"])
def test_a_bias_is_taken_as_it_was_before_a_merge(merged: str) -> None:
    """Which a merge of DoRA scales, and one of IA³'s adds nothing to, where there is none."""

    def adapted() -> nn.Module:
        torch.manual_seed(0)
        made = nn.ModuleDict({"q": nn.Linear(8, 8), "up": nn.Linear(8, 8, bias=False)})
        inject(made, IA3(target_modules=["q", "up"], feedforward_modules=[]))
        for parameter in made.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
        return made

    here, there = adapted(), adapted()
    merge(here if merged == "here" else there)
    check(here, there)
