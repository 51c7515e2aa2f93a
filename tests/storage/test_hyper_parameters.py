"""Hyper-parameters that LightningCLI saved: a module is made from their values, and of nothing that they name."""

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import lightning as L
import pytest
import torch
from modules import Regression, loader, trainer
from strangers import unsealed
from torch import nn

from lightning_peft import PEFTError
from lightning_peft.storage.checkpoint_directory import AdapterDirectory

LIGHTNING = "lightning.pytorch.cli.instantiate_module"


class Colour(Enum):
    RED = 1


class Typed(Regression):
    """Takes arguments of all kinds, and keeps them."""

    def __init__(
        self,
        rate: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.99),
        names: dict[str, int] | None = None,
        layer: nn.Module | None = None,
        anything: Any = None,
        call: Callable[..., Any] | None = None,
        colour: Colour = Colour.RED,
        folders: list[Path] | None = None,
        choice: Literal["a", "b"] = "a",
        size: Annotated[int, "of something"] = 1,
    ) -> None:
        super().__init__()
        self.got = (rate, betas, names, layer, anything, call, colour, folders)
        self.chosen = (choice, size)


class Derived(Typed):
    pass


class Data(L.LightningDataModule):
    def __init__(self, size: int = 1) -> None:
        super().__init__()
        self.size = size


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    run = trainer(root)
    run.fit(Typed(), loader())
    run.save_checkpoint(root / "file")
    run.save_checkpoint(root / "directory", storage_options=AdapterDirectory())
    return root


@pytest.fixture(params=["file", "directory"])
def checkpoint(request: pytest.FixtureRequest, saved: Path) -> Callable[..., Path]:
    """Writes a checkpoint with the given hyper-parameters."""

    def write(key: str = "hyper_parameters", **values: Any) -> Path:
        file = saved / "file" if request.param == "file" else unsealed(saved / "directory") / "trainer_state.ckpt"
        content = torch.load(file, weights_only=True)
        for known in ("hyper_parameters", "hparams", "module_arguments", "datamodule_hyper_parameters"):
            content.pop(known, None)
        torch.save({**content, key: values}, file)
        return saved / request.param

    return write


def test_values_are_used(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint(_instantiator=LIGHTNING, rate=1, betas=[0.5, 0.6], names={"a": 2}, layer=None, unknown=3)
    assert Typed.load_from_checkpoint(path).got == (1, [0.5, 0.6], {"a": 2}, None, None, None, Colour.RED, None)
    assert Typed.load_from_checkpoint(checkpoint(_instantiator=LIGHTNING, choice="b", size=2)).chosen == ("b", 2)
    path = checkpoint(_instantiator=LIGHTNING, rate=1, betas=[0.5, 0.6])
    assert Typed.load_from_checkpoint(path, rate=7.0).got[:2] == (7.0, [0.5, 0.6])


@pytest.mark.parametrize("kind", [Typed, L.LightningModule])
def test_the_class_that_was_trained_is_made(checkpoint: Callable[..., Path], kind: Any) -> None:
    path = checkpoint(_instantiator=LIGHTNING, _class_path=f"{__name__}.Derived", rate=3.0)
    loaded = kind.load_from_checkpoint(path)
    assert type(loaded) is Derived
    assert loaded.got[0] == 3.0


@pytest.mark.parametrize("weights_only", [None, True])
@pytest.mark.parametrize(
    "values",
    [
        {"layer": {"class_path": "torch.nn.Linear", "init_args": {"in_features": 3, "out_features": 3}}},
        {"anything": {"class_path": "subprocess.Popen", "init_args": {"args": ["true"]}}},
        {"anything": [{"more": {"class_path": "subprocess.Popen"}}]},
        {"call": {"class_path": "subprocess.Popen"}},
        {"call": "os.system"},
        {"layer": "Linear"},
        {"colour": "RED"},
        {"folders": ["here"]},
        {"names": {"a": "b"}},
        {"rate": "0.1"},
        {"choice": "c"},
        {"size": "2"},
    ],
)
def test_what_an_object_would_be_made_from_is_refused(
    checkpoint: Callable[..., Path], values: dict[str, Any], weights_only: bool | None
) -> None:
    path = checkpoint(_instantiator=LIGHTNING, **values)
    (name,) = values
    with pytest.raises(PEFTError, match=rf"{name}=.*load_from_checkpoint\(path, {name}=.*weights_only=False"):
        Typed.load_from_checkpoint(path, weights_only=weights_only)
    given = Colour.RED if name == "colour" else None
    assert given in Typed.load_from_checkpoint(path, weights_only=weights_only, **{name: given}).got


def test_the_caller_may_trust_the_file(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint(_instantiator=LIGHTNING, layer={"class_path": "torch.nn.Identity"}, colour="RED")
    assert isinstance(Typed.load_from_checkpoint(path, weights_only=False).got[3], nn.Identity)


@pytest.mark.parametrize("key", ["hyper_parameters", "hparams", "module_arguments"])
@pytest.mark.parametrize("name", ["os.system", ["os.system"], 3])
def test_another_instantiator_is_refused(checkpoint: Callable[..., Path], key: str, name: Any) -> None:
    with pytest.raises(PEFTError, match="not LightningCLI's function"):
        Typed.load_from_checkpoint(checkpoint(key, _instantiator=name))


@pytest.mark.parametrize("path", ["pip.X", "subprocess.Popen", f"{__name__}.Data", 3, "X"])
def test_another_class_is_refused(checkpoint: Callable[..., Path], path: Any) -> None:
    with pytest.raises(PEFTError, match="not Typed or a class derived from it"):
        Typed.load_from_checkpoint(checkpoint(_instantiator=LIGHTNING, _class_path=path))


def test_a_datamodule_is_made_from_values_too(checkpoint: Callable[..., Path]) -> None:
    key = Data.CHECKPOINT_HYPER_PARAMS_KEY
    assert Data.load_from_checkpoint(checkpoint(key, _instantiator=LIGHTNING, size=4)).size == 4
    with pytest.raises(PEFTError, match="not LightningCLI's function"):
        Data.load_from_checkpoint(checkpoint(key, _instantiator="os.system"))
    with pytest.raises(PEFTError, match="size="):
        Data.load_from_checkpoint(checkpoint(key, _instantiator=LIGHTNING, size={"class_path": "os.system"}))


def test_a_dict_of_the_users_own_is_the_users(checkpoint: Callable[..., Path]) -> None:
    own = {"class_path": "torch.nn.Linear"}
    assert Typed.load_from_checkpoint(checkpoint(anything=own)).got[4] == own
