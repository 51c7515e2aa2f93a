"""`lightning-peft analyse`; the judges are the tensors of the files, by NumPy."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import build
from safetensors.torch import load_file

from lightning_peft import IA3, LoRA, PrefixTuning, inject, save_adapter
from lightning_peft.cli import main

QV = ["q_proj", "v_proj"]


def ran(capsys: Any, *arguments: str) -> tuple[str, str]:
    """Return what a command prints, and its error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["analyse", *arguments])
    return capsys.readouterr().out, "" if stop.value.code == 0 else str(stop.value.code)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("adapters")
    build("llama")[0].save_pretrained(folder / "base")
    methods = {
        "first": LoRA(r=4, alpha=12, target_modules=QV),
        "second": LoRA(r=2, target_modules=QV),
        "more": LoRA(r=2, target_modules=[*QV, "k_proj"]),
        "elsewhere": LoRA(r=2, target_modules=["down_proj"]),
        "ia3": IA3(),
        "prefix": PrefixTuning(num_virtual_tokens=2),
    }
    for number, (name, method) in enumerate(methods.items()):
        model = build("llama")[0]
        inject(model, method)
        for offset, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            generator = torch.Generator().manual_seed(100 * number + offset)
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        save_adapter(model, folder / name)
    return {path.name: str(path) for path in folder.iterdir()}


def test_figures_are_those_of_the_tensors(places: dict[str, str], capsys: Any) -> None:
    out, error = ran(capsys, places["first"], places["second"], f"--base={places['base']}", "--json")
    assert not error
    rows = {row["module"]: row for row in map(json.loads, out.splitlines())}
    tensors, others = (load_file(f"{places[name]}/adapter_model.safetensors") for name in ("first", "second"))
    weights = dict(build("llama")[0].named_parameters())
    assert len(rows) == 4
    for name, row in rows.items():
        a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"].double().numpy() for side in "AB")
        change, weight = 3 * b @ a, weights[f"{name}.weight"].detach().double().numpy()
        u, _, vh = np.linalg.svd(change)
        assert row["norm"] == pytest.approx(np.linalg.norm(change))
        assert row["relative_norm"] == pytest.approx(np.linalg.norm(change) / np.linalg.norm(weight))
        assert row["factor"] == pytest.approx(np.linalg.norm(change) / np.linalg.norm(u[:, :4].T @ weight @ vh[:4].T))
        a2, b2 = (others[f"base_model.model.{name}.lora_{side}.weight"].double().numpy() for side in "AB")
        vh2 = np.linalg.svd(b2 @ a2)[2]
        assert row["similarity"] == pytest.approx(np.linalg.norm(vh[:4] @ vh2[:2].T) ** 2 / 2)
        assert row["random_similarity"] == pytest.approx(4 / 32)
        spans = [np.linalg.svd(m)[2][: len(m)] for m in (a, a2)]
        assert row["similarity_a"] == pytest.approx(np.linalg.norm(spans[0] @ spans[1].T) ** 2 / 2)


def test_a_table_and_plots(places: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    plots = tmp_path / "new" / "plots"
    out, error = ran(capsys, places["first"], places["second"], f"--base={places['base']}", f"--plot={plots}")
    assert not error
    heading, *lines = out.splitlines()
    assert heading.split()[:3] == ["module", "rank", "|dW|"]
    assert len({len(line) for line in [heading, *lines[:4]]}) == 1
    names = ["factor", "norm", "relative_norm", "similarities", "spectra"]
    assert sorted(path.stem for path in plots.glob("*.png")) == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in plots.glob("*.png"))


def test_another_method_with_its_base(places: dict[str, str], capsys: Any) -> None:
    out, error = ran(capsys, places["ia3"], f"--base={places['base']}")
    assert not error
    assert "k_proj" in out


def test_what_one_adapts_alone_is_told(places: dict[str, str], capsys: Any) -> None:
    with pytest.warns(UserWarning, match="not compared: .*k_proj"):
        out, error = ran(capsys, places["first"], places["more"])
    assert not error
    assert "k_proj" not in out


def test_one_seed_is_told(places: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    for name in ("one", "other"):
        model = build("llama")[0]
        inject(model, LoRA(r=2, target_modules=QV))
        save_adapter(model, tmp_path / name)
    with pytest.warns(UserWarning, match="began with the same A"):
        ran(capsys, str(tmp_path / "one"), str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["ia3"], "Name its base model"),
        (["first", "elsewhere"], "no module is the same"),
        (["prefix", "base"], "no change of the weight"),
        (["missing"], "missing"),
    ],
)
def test_mistakes(given: list[str], said: str, places: dict[str, str], capsys: Any) -> None:
    arguments = [places.get(name, name) for name in given if name != "base"]
    out, error = ran(capsys, *arguments, *([f"--base={places['base']}"] if "base" in given else []))
    assert said in error
    assert not out
