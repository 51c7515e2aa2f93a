"""What the page of Fabric shows, on one process: a run that goes on from its file learns what it would have learnt."""

from pathlib import Path
from typing import Any

import pages
import pytest
import torch
from pages import ROOT

from lightning_peft import adapter_state_dict, load_adapter

PAGE = ROOT / "examples" / "docs" / "fabric.md"


def test_a_run_that_goes_on_is_the_one_that_would_have_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    for block in pages.blocks(PAGE, "python"):
        exec(block.text, scope)
    resumed = adapter_state_dict(scope["net"])
    net, model, optimizer = scope["start"]()
    load_adapter(net, "adapter")
    scope["train"](model, optimizer, scope["data"])
    half_way = {name: tensor.clone() for name, tensor in adapter_state_dict(net).items()}
    scope["train"](model, optimizer, scope["data"])
    straight = adapter_state_dict(net)
    assert resumed.keys() == straight.keys() == scope["saved"]["adapter"].keys()
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    assert not any(torch.equal(half_way[name], straight[name]) for name in straight)
