"""The file of a comparison, and every mistake in it that is told before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from comparable import grid_file

from lightning_peft.cli import main
from lightning_peft.comparison.cells import Cell, cells, config_of, placed, run_of
from lightning_peft.comparison.grid import read_grid
from lightning_peft.comparison.keys import put
from lightning_peft.errors import PEFTError

SEEDS = {"seed": [0, 1]}
CHOICE = {"axis": "lr", "metric": "val_score", "mode": "max"}
LR = {"lr": [0.1, 0.01]}


def config_by(**changes: Any) -> Callable[[Path], Any]:
    """A change of the config beside the grid."""

    def change(folder: Path) -> None:
        file = folder / "run.yaml"
        config = yaml.safe_load(file.read_text())
        for key, value in changes.items():
            config["trainer"][key] = value
        file.write_text(yaml.safe_dump(config))

    return change


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown entry": ({"reprot": 1}, "no key 'reprot'. Did you mean 'report'"),
    "an unknown axis": ({"axes": {"rnak": [1, 2]}}, "axis rnak: there is no key 'rnak'. Did you mean 'rank'"),
    "an unknown key in a bundle": ({"axes": {"m": {"a": {"rnak": 1}, "b": {"rank": 2}}}}, "Did you mean 'rank'"),
    "an unknown key that is set": ({"set": {"traner.max_steps": 1}}, "Did you mean 'trainer'"),
    "an unknown argument": ({"axes": {"model.bset": [0.1, 0.2]}}, "Known has no 'bset'. Did you mean 'best'"),
    "an unknown option of the Trainer": ({"axes": {"trainer.max_stepss": [1, 2]}}, "Did you mean 'max_steps'"),
    "an unknown hyper-parameter": ({"axes": {"method.alhpa": [1, 2]}}, "LoRA has no 'alhpa'. Did you mean 'alpha'"),
    "an unknown method": ({"axes": {"method": ["LoRA", "Lora2"]}}, "There is no method 'Lora2'. Did you mean 'LoRA'"),
    "an axis of one": ({"axes": {"rank": [1], **SEEDS}}, "axis rank has 1 value: there is nothing to compare"),
    "a bundle of one": ({"axes": {"m": {"a": {"rank": 1}}, **SEEDS}}, "axis m has 1 value"),
    "no axes": ({"axes": {}}, "there are no axes"),
    "an axis that is none": ({"axes": {"rank": 3}}, "axis rank is 3; it is a list of values"),
    "a value twice": ({"axes": {"rank": [2, 2]}}, "axis rank has 2 twice: two cells would have one name"),
    "two cells with one name": (
        {
            "axes": {
                "a": {"q, v": {"rank": 1}, "q": {"rank": 2}},
                "b": {"o": {"method.alpha": 1}, "v, o": {"method.alpha": 2}},
            }
        },
        "two cells have the name 'q, v, o'",
    ),
    "an axis without effect": (
        {"axes": {"rank": [1, 2], "m": {"a": {"method": "LoRA"}, "b": {"method": "IA3"}}}},
        "have the same config. An axis has no effect",
    ),
    "a value that is refused": ({"axes": {"rank": [1, -2]}}, "cell 'rank=-2, seed=0': LoRA: rank r=-2 was given"),
    "a value of another type": ({"axes": {"trainer.max_epochs": [1, "x"]}}, "cell 'trainer.max_epochs=x, seed=0'"),
    "no metrics": ({"report": {}}, "no metric is named"),
    "metrics of another stage": ({"report": {"tset": ["x"]}}, "no key 'tset'. Did you mean 'test'"),
    "a choice without its axis": ({"choose": CHOICE}, "choose: axis is 'lr'"),
    "a choice of seeds": ({"choose": {**CHOICE, "axis": "seed"}}, "choose: axis is 'seed'"),
    "a choice with another mode": (
        {"choose": {**CHOICE, "mode": "best"}, "axes": {"rank": [1, 2], **LR}},
        "mode 'best'. Name a metric that validation logs, and min or max",
    ),
    "a choice with unknown seeds": (
        {"choose": {**CHOICE, "seeds": [7]}, "axes": {"rank": [1, 2], **LR, **SEEDS}},
        "there is no seed 7",
    ),
    "no config": ({"config": "missing.yaml"}, "missing.yaml cannot be read"),
    "no directory": ({"out": None}, "out is None"),
    "another parameter of SLURM": ({"keep_adapters": "yes"}, "keep_adapters is 'yes'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_before_anything_runs(mistake: str, tmp_path: Path) -> None:
    changes, said = MISTAKES[mistake]
    if "axes" in changes and mistake not in ("an axis of one", "a bundle of one", "no axes"):
        changes = {**changes, "axes": {**changes["axes"], **SEEDS}}
    assert said in told(grid_file(tmp_path, **changes))
    assert not (tmp_path / "out").exists()


def told(file: Path) -> str:
    """Return the error of a grid; from the whole command only where its parser has to find it, which takes longer."""
    try:
        cells(read_grid(file))
    except PEFTError as error:
        return str(error)
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(file)])
    return str(stop.value.code)


def test_a_mistake_is_one_message_of_the_command(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(grid_file(tmp_path, axes={"rank": [1]}))])
    assert str(stop.value.code).startswith("lightning-peft: error: ")


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    file = grid_file(tmp_path)
    file.write_text(file.read_text() + "axes: {rank: [1, 2]}\n")
    with pytest.raises(PEFTError, match="'axes' is there twice"):
        read_grid(file)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (config_by(strategy="ddp"), "strategy is the name 'ddp', which has no keys"),
        (config_by(strategy={"class_path": "lightning.pytorch.strategies.DDPStrategy"}), "PEFTStrategy was expected"),
    ],
)
def test_another_strategy_is_refused(change: Callable[[Path], Any], said: str, tmp_path: Path) -> None:
    file = grid_file(tmp_path, axes={"model.best": [0.1, 0.2]} if "expected" in said else {"rank": [1, 2]})
    change(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(file)])
    assert said in str(stop.value.code)


def test_numbers_are_numbers(tmp_path: Path) -> None:
    file = grid_file(tmp_path)
    file.write_text(file.read_text() + "set: {model.lr: 1e-3, model.best: 2.5E2}\n")
    assert read_grid(file).settings == {"model.lr": 0.001, "model.best": 250.0}


def named(tmp_path: Path, **changes: Any) -> tuple[Any, dict[str, Cell]]:
    grid = read_grid(grid_file(tmp_path, **changes))
    return grid, {cell.name: cell for cell in cells(grid)}


def test_cells_are_all_combinations(tmp_path: Path) -> None:
    bundles = {"q": {"targets": ["layer"]}, "all": {"targets": "all-linear"}}
    grid, found = named(tmp_path, axes={"weights": bundles, "rank": [1, 2], **SEEDS})
    assert list(found) == ["q, rank=1", "q, rank=2", "all, rank=1", "all, rank=2"]
    config = config_of(grid, found["all, rank=2"], None, "1")
    method = config["trainer"]["strategy"]["init_args"]["method"]
    assert method == {"class_path": "lightning_peft.LoRA", "init_args": {"r": 2, "target_modules": "all-linear"}}
    assert config["seed_everything"] == 1


def test_a_bundle_has_candidates_of_its_own(tmp_path: Path) -> None:
    bundles = {"one": {"rank": 1, "lr": [0.5, 0.25]}, "two": {"rank": 2}, "three": {"rank": 3, "lr": 0.125}}
    grid, found = named(tmp_path, axes={"m": bundles, **LR, **SEEDS}, choose=CHOICE)
    assert {name: list(cell.candidates) for name, cell in found.items()} == {
        "one": ["0.5", "0.25"],
        "two": ["0.1", "0.01"],
        "three": ["0.125"],
    }
    config = config_of(grid, found["one"], "0.25", "0")
    assert config["model"] == {"class_path": "comparable.Known", "init_args": {"lr": 0.25}}


def test_what_comes_later_goes_over_what_came_before(tmp_path: Path) -> None:
    bundles = {"a": {"method": "IA3"}, "b": {"method": "LoRA"}}
    grid, found = named(tmp_path, set={"rank": 7}, axes={"m": bundles, **SEEDS})
    method = config_of(grid, found["b"], None, "0")["trainer"]["strategy"]["init_args"]["method"]
    assert method == {"class_path": "lightning_peft.LoRA"}


def test_a_run_writes_into_its_own_directory(tmp_path: Path) -> None:
    grid, found = named(tmp_path)
    grid.config["trainer"]["callbacks"] = [  # type: ignore[index]
        {
            "class_path": "lightning_peft.callbacks.AdapterCheckpoint",
            "init_args": {"dirpath": "x", "monitor": "val_loss"},
        },
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"dirpath": "y"}},
    ]
    grid.config["trainer"]["logger"] = {"class_path": "CSVLogger", "init_args": {"save_dir": "z"}}  # type: ignore[index]
    first, second = (run_of(grid, found["rank=1"], None, seed) for seed in ("0", "1"))
    assert first.directory != second.directory
    trainer = placed(first)["trainer"]
    assert trainer["default_root_dir"] == str(first.directory)
    adapters, model = trainer["callbacks"]
    assert adapters["init_args"] == {
        "dirpath": str(first.directory / "checkpoints"),
        "monitor": "val_loss",
        "save_last": True,
    }
    assert model["init_args"]["dirpath"].startswith(str(first.directory))
    assert trainer["logger"]["init_args"]["save_dir"] == str(first.directory)
    assert trainer["strategy"]["init_args"]["merge_on_train_end"] is False


def test_another_config_has_another_directory(tmp_path: Path) -> None:
    grid, found = named(tmp_path)
    other, again = named(tmp_path, set={"trainer.max_epochs": 3})
    assert run_of(grid, found["rank=1"], None, "0").directory != run_of(other, again["rank=1"], None, "0").directory


def test_a_seed_is_also_that_of_the_data() -> None:
    config: dict[str, Any] = {"data": {"class_path": "lightning_peft.tasks.InstructionData", "init_args": {}}}
    put(config, "seed", 3)
    assert config["data"]["init_args"]["seed"] == config["seed_everything"] == 3
    plain: dict[str, Any] = {"data": {"class_path": "lightning_peft.tasks.Seq2SeqData"}}
    put(plain, "seed", 3)
    assert plain == {"data": {"class_path": "lightning_peft.tasks.Seq2SeqData"}, "seed_everything": 3}


def test_several_methods_are_one() -> None:
    config: dict[str, Any] = {}
    put(config, "method", [{"class_path": "LoRA", "init_args": {"r": 2}}, "prompt_tuning"])
    methods = config["trainer"]["strategy"]["init_args"]["method"]
    assert [method["class_path"] for method in methods] == ["lightning_peft.LoRA", "lightning_peft.PromptTuning"]
    with pytest.raises(PEFTError, match="there is a list of 2 at 'r'"):
        put(config, "rank", 3)
    put(config, "trainer.strategy.method.0.r", 3)
    assert methods[0]["init_args"] == {"r": 3}
