"""A model is looked at once: a view's facts against torch's own walks, and how often operations touch a module."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from torch import nn

from lightning_peft import LoRA, PEFTError, eject, inject, load_adapter, save_adapter
from lightning_peft.core.view import ModelView, once


class Watched(nn.Linear):
    """Counts how often its children are looked up, which every walk over the model does."""

    touches = 0

    def __getattribute__(self, name: str) -> Any:
        if name == "_modules":
            type(self).touches += 1
        return super().__getattribute__(name)


def watched() -> nn.Module:
    """Return a Llama of two layers in which one projection counts."""
    model = build("llama")[0]
    host = model.model.layers[0].self_attn.q_proj
    twin = Watched(host.in_features, host.out_features, bias=False)
    twin.weight = host.weight
    model.model.layers[0].self_attn.q_proj = twin
    return model


def touches(call: Callable[[], Any]) -> int:
    before = Watched.touches
    call()
    return Watched.touches - before


def test_operations_look_at_a_module_a_few_times(tmp_path: Path) -> None:
    model, fresh = watched(), watched()
    counts = {
        "inject": touches(lambda: inject(model, LoRA(r=2))),
        "save": touches(lambda: save_adapter(model, tmp_path / "a")),
        "load": touches(lambda: load_adapter(fresh, tmp_path / "a")),
        "load again": touches(lambda: load_adapter(model, tmp_path / "a")),
        "eject": touches(lambda: eject(model)),
    }
    # As many as it takes today: one more walk over the model is to be noticed.
    limits = {"inject": 5, "save": 1, "load": 5, "load again": 1, "eject": 5}
    assert not {name: count for name, count in counts.items() if not 0 < count <= limits[name]}, counts


class Twice(nn.Module):
    """One module in two places, a tied weight, and buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.again = self.body
        self.head = nn.Linear(3, 3)
        self.head.weight = self.body[0].weight  # type: ignore[assignment]
        self.register_buffer("scale", torch.ones(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.again(self.body(x))) * self.scale


def test_names_are_those_of_torch() -> None:
    model = Twice()
    view = ModelView(model)
    assert view.modules == dict(model.named_modules())
    assert {**view.modules, **{a: view.modules[n] for a, n in view.aliases.items()}} == dict(
        model.named_modules(remove_duplicate=False)
    )
    assert view.aliases == {"again": "body", "again.0": "body.0", "again.1": "body.1"}
    assert list(view.parameters.items()) == list(model.named_parameters())
    assert view.tensors == {**dict(model.named_buffers()), **dict(model.named_parameters())}
    assert view.shared == {id(model.head.weight)}


def test_adapters_are_no_part_of_the_model() -> None:
    model = Twice()
    before = ModelView(copy.deepcopy(model))
    inject(model, LoRA(r=2, target_modules="body.0"))
    view = ModelView(model)
    assert view.modules.keys() == before.modules.keys()
    assert view.tensors.keys() == before.tensors.keys()
    assert [name for name, _, _ in view.slots] == ["body.0"]
    assert view.adapter_parameters.keys() == {f"body.0.peft.default.lora_{letter}" for letter in "AB"}
    assert not before.slots


def test_wrappers_leave_no_trace_in_names() -> None:
    model = Twice()
    inner = model.body[0]
    model.body[0] = torch.compile(inner)  # type: ignore[assignment]
    view = ModelView(torch.compile(model))
    assert view.module is model
    assert view.modules["body.0"] is inner
    assert "body.0.weight" in view.parameters


def test_a_part_is_not_looked_at_again() -> None:
    model = watched()
    view = ModelView(model)
    part: list[ModelView] = []
    assert not touches(lambda: part.append(view.part("model.layers.0")))
    assert part[0].modules == dict(model.model.layers[0].named_modules())
    assert view.part("") is view
    assert ModelView(Twice()).part("again.0").kind == "Linear"
    with pytest.raises(PEFTError, match="no part 'nowhere'"):
        view.part("nowhere")


def test_a_fact_is_worked_out_once_for_each_view() -> None:
    calls = []

    @once
    def fact(view: ModelView) -> int:
        calls.append(view)
        return len(view.modules)

    first, second = ModelView(Twice()), ModelView(Twice())
    assert fact(first) == fact(first) == fact(second)
    assert calls == [first, second]
