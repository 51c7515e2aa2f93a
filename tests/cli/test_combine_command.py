"""``lightning-peft combine``, judged by the sum of the two changes and by HF PEFT's reading of the result."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import build, outputs, randomise

from lightning_peft import IA3, LoRA, inject, save_adapter
from lightning_peft.cli import main


def ran(*arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["combine", *arguments])
    return "" if stop.value.code == 0 else str(stop.value.code)


def changed_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights that HF PEFT makes of the base and an adapter."""
    model = peft.PeftModel.from_pretrained(build("llama")[0], path).merge_and_unload()
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def test_a_weighted_sum(tmp_path: Path) -> None:
    for name, targets, rank in (("sql", ["q_proj", "v_proj"], 4), ("chat", ["q_proj"], 2)):
        model: Any = build("llama")[0]
        model.save_pretrained(tmp_path / "base")
        inject(model, LoRA(r=rank, target_modules=targets))
        randomise(model)
        save_adapter(model, tmp_path / name)
    sql, chat, base = (str(tmp_path / name) for name in ("sql", "chat", "base"))
    weights = [0.7, -0.3]
    assert not ran(f"[{sql}, {chat}]", f"--weights={weights}", f"--model={base}", f"--out={tmp_path / 'both'}")
    before = dict(build("llama")[0].named_parameters())
    first, second, both = (changed_weights(tmp_path / name) for name in ("sql", "chat", "both"))
    for name, weight in before.items():
        expected = weight + 0.7 * (first[name] - weight) - 0.3 * (second[name] - weight)
        assert (both[name] - expected).abs().max() <= 1e-5
    assert "would replace" in ran(f"[{sql}, {chat}]", f"--model={base}", f"--out={sql}")
    assert "and a weight for each" in ran(
        f"[{sql}, {chat}]", "--weights=[1.0]", f"--model={base}", f"--out={tmp_path / 'more'}"
    )
    assert not (tmp_path / "more").exists()


def test_equal_weights_are_those_of_one(tmp_path: Path) -> None:
    model, inputs = build("llama")
    model.save_pretrained(tmp_path / "base")
    inject(model, LoRA(r=4))
    randomise(model)
    save_adapter(model, tmp_path / "it")
    given = f"[{tmp_path / 'it'}, {tmp_path / 'it'}]"
    assert not ran(given, f"--model={tmp_path / 'base'}", f"--out={tmp_path / 'mean'}", "--method=svd", "--rank=4")
    judge = peft.PeftModel.from_pretrained(build("llama")[0], tmp_path / "mean").eval()
    assert (outputs(judge, inputs) - outputs(model, inputs)).abs().max() <= 1e-5


def test_what_cannot_be_combined_is_named_by_its_directory(tmp_path: Path) -> None:
    for name, method in (("sql", LoRA(r=2)), ("ia3", IA3())):
        model: Any = build("llama")[0]
        model.save_pretrained(tmp_path / "base")
        inject(model, method)
        randomise(model)
        save_adapter(model, tmp_path / name)
    sql, ia3, base = (str(tmp_path / name) for name in ("sql", "ia3", "base"))
    said = ran(f"[{sql}, {ia3}]", f"--model={base}", f"--out={tmp_path / 'both'}")
    assert f"{ia3!r} is a IA3" in said
    assert "given_" not in said
    assert not (tmp_path / "both").exists()
