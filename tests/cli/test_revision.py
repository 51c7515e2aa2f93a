"""The revision of a base on a hub: recorded, shown, kept by the commands, and what they load again."""

import json
from pathlib import Path

import huggingface_hub
import peft
import pytest
import torch
from families import build, strongly
from torch import nn

from lightning_peft import LoRA, inject, load_adapter, save_adapter
from lightning_peft.cli import main
from lightning_peft.tasks.pretrained import load_model

OLD, NEW = "0" * 39 + "1", "0" * 39 + "2"
IDS = torch.arange(6)[None]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub's files with two commits of one model, of which the newer one is the main branch's."""
    repository = tmp_path / "hub" / "models--me--tiny"
    model, _ = build("llama")
    for commit in (OLD, NEW):
        model.save_pretrained(repository / "snapshots" / commit)
        with torch.no_grad():
            model.lm_head.weight.mul_(2)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(NEW)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def config(path: Path) -> dict[str, str]:
    return json.loads((path / "adapter_config.json").read_text())


def adapted(model: nn.Module, path: Path) -> torch.Tensor:
    inject(model, LoRA(r=2, target_modules=["q_proj"]))
    strongly(model)
    save_adapter(model, path)
    return model(IDS).logits


def run(*command: str | Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*map(str, command)])
    assert stop.value.code in (0, None), stop.value.code


def test_it_is_recorded_shown_kept_and_loaded_again(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = adapted(load_model(f"me/tiny@{OLD}"), tmp_path / "adapter")
    assert (config(tmp_path / "adapter")["base_model_name_or_path"], config(tmp_path / "adapter")["revision"]) == (
        "me/tiny",
        OLD,
    )
    judge = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert (judge(IDS).logits - expected).abs().max() <= 1e-5

    run("inspect", tmp_path / "adapter")
    assert f"me/tiny@{OLD}" in capsys.readouterr().out
    run("export", tmp_path / "adapter", "--out", tmp_path / "exported")
    run("convert", tmp_path / "adapter", "--rank", 2, "--out", tmp_path / "converted")
    for copy in ("exported", "converted"):
        assert config(tmp_path / copy)["revision"] == OLD
    run("merge", tmp_path / "adapter", "--out", tmp_path / "merged")
    merged = load_model(str(tmp_path / "merged"))
    assert (merged(IDS).logits - expected).abs().max() <= 1e-4
    assert not hasattr(merged.config, "_commit_hash")


def test_a_branch_is_the_commit_that_it_was(hub: Path, tmp_path: Path) -> None:
    adapted(load_model("me/tiny"), tmp_path / "adapter")
    assert config(tmp_path / "adapter")["revision"] == NEW


def test_the_path_of_a_cache_tells_it(hub: Path, tmp_path: Path) -> None:
    model = load_model(str(hub / "models--me--tiny" / "snapshots" / OLD))
    expected = adapted(model, tmp_path / "adapter")
    assert config(tmp_path / "adapter")["revision"] == OLD
    run("merge", tmp_path / "adapter", "--out", tmp_path / "merged")
    assert (load_model(str(tmp_path / "merged"))(IDS).logits - expected).abs().max() <= 1e-4


def test_elsewhere_there_is_none(tmp_path: Path) -> None:
    model, _ = build("llama")
    model.save_pretrained(tmp_path / "base")
    adapted(load_model(str(tmp_path / "base")), tmp_path / "adapter")
    assert config(tmp_path / "adapter")["revision"] is None
    load_adapter(build("llama")[0], tmp_path / "adapter")
