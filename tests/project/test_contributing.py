"""The method that CONTRIBUTING shows, added at run time and taken through its whole life."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from families import build, outputs
from modules import assert_same
from resuming import SteppedLlama, logits, straight_and_resumed
from torch import nn

from lightning_peft import PEFTMethod, adapter_state_dict, eject, inject, load_adapter, merge, unmerge
from lightning_peft.core import method as registry
from lightning_peft.core.method import method_from_config, method_from_name, registered_methods

TEXT = (Path(__file__).resolve().parents[2] / "CONTRIBUTING.md").read_text()


@pytest.fixture
def rescaling(monkeypatch: pytest.MonkeyPatch) -> PEFTMethod:
    (snippet,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert len(snippet.splitlines()) <= 50
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    module = ModuleType("rescaling")
    monkeypatch.setitem(sys.modules, "rescaling", module)
    exec(snippet, module.__dict__)
    assert registered_methods()["rescaling"] is module.Rescaling
    return module.Rescaling()


def test_the_life_of_the_method_in_contributing(rescaling: PEFTMethod, tmp_path: Path) -> None:
    assert method_from_name("rescaling") == method_from_config(rescaling.config()) == rescaling

    straight, resumed = straight_and_resumed(tmp_path, SteppedLlama, "rescaling")
    assert_same(adapter_state_dict(straight), adapter_state_dict(resumed))

    base, merged = logits(SteppedLlama()), logits(straight)  # the strategy merges at the end
    assert not torch.allclose(merged, base, atol=1e-4)
    unmerge(straight)
    tuned = logits(straight)
    assert (tuned - merged).abs().max() <= 1e-5
    loaded = SteppedLlama()
    load_adapter(loaded, tmp_path / "straight" / "last")
    assert torch.equal(logits(loaded), tuned)
    assert torch.equal(logits(SteppedLlama.load_from_checkpoint(tmp_path / "straight" / "last")), tuned)
    eject(straight)
    assert torch.equal(logits(straight), base)


@pytest.mark.parametrize("family", ["gpt2", "bert", "sequential"])
def test_it_computes_and_merges_what_it_says(rescaling: PEFTMethod, family: str) -> None:
    model, inputs = build(family)
    before = outputs(model, inputs)
    hosts = inject(model, rescaling)
    assert torch.equal(outputs(model, inputs), before)
    host = model.get_submodule(hosts[-1])
    host.peft.default.gain.data.fill_(0.5)  # type: ignore[union-attr]
    plain = build(family)[0]
    twin = plain.get_submodule(hosts[-1])
    with torch.no_grad():
        for parameter in (p for p in (twin.weight, twin.bias) if isinstance(p, nn.Parameter)):
            parameter.mul_(1.5)
    expected = outputs(plain, inputs)
    assert (expected - before).abs().max() > 1e-5
    assert torch.allclose(outputs(model, inputs), expected, atol=1e-5)
    merge(model, unload=True)
    assert torch.allclose(outputs(model, inputs), expected, atol=1e-5)
