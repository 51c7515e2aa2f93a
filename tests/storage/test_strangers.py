"""Directories from strangers: nothing in them is executed, and no file decides how its directory is read."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from modules import Regression, adapter_state, assert_same, loader, trainer
from strangers import unsealed

from lightning_peft import LoRA, PEFTError, PEFTStrategy, load_adapter
from lightning_peft.files.contents import MARKER, read_json, write_json
from lightning_peft.storage.checkpoint_directory import AdapterDirectory, read_directory


class Ran:
    """Makes the folder ``ran`` when it is unpickled."""

    def __init__(self, where: Path) -> None:
        self.path = str(where / "ran")

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's adapter directory, and its checkpoint as a file and in shards."""
    root = tmp_path_factory.mktemp("trained")
    run = trainer(root)
    run.fit(Regression(), loader())
    run.save_checkpoint(root / "directory", storage_options=AdapterDirectory())
    run.save_checkpoint(root / "file.ckpt")
    rest = torch.load(root / "file.ckpt", weights_only=True)
    pieces = {"model": rest.pop("state_dict"), "optimizer_0": {"state": rest.pop("optimizer_states")[0]["state"]}}
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(pieces, storage_writer=dcp.FileSystemWriter(root / "sharded"), no_dist=True)
    torch.save({**rest, "lightning_peft_optimizer_values": []}, root / "sharded" / "meta.pt")
    return root


@pytest.fixture
def directory(trained: Path, tmp_path: Path) -> Path:
    """A copy of the adapter directory."""
    return unsealed(Path(shutil.copytree(trained / "directory", tmp_path / "directory")))


@pytest.fixture
def sharded(trained: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint in shards."""
    return Path(shutil.copytree(trained / "sharded", tmp_path / "sharded"))


def pickled_beside(directory: Path) -> None:
    shutil.copy(directory / "trainer_state.ckpt", directory / "meta.pt")
    (directory / ".metadata").write_bytes(pickle.dumps(Ran(directory.parent)))


def in_shards(directory: Path) -> None:
    pickled_beside(directory)
    (directory / "trainer_state.ckpt").unlink()


def of_deepspeed(directory: Path) -> None:
    (directory / "checkpoint").mkdir()
    torch.save(Ran(directory.parent), directory / "checkpoint" / "mp_rank_00_model_states.pt")
    layout = {"stage": 2, "processes": 1, "groups": []}
    write_json(directory / MARKER, {**read_json(directory / MARKER), "deepspeed": layout})
    (directory / "trainer_state.ckpt").unlink()


def in_the_trainer_state(directory: Path) -> None:
    state = torch.load(directory / "trainer_state.ckpt", weights_only=True)
    torch.save({**state, "more": Ran(directory.parent)}, directory / "trainer_state.ckpt")


WAYS: dict[str, Callable[[Path], Any]] = {
    "load_adapter": lambda path: load_adapter(Regression(), path),
    "load_from_checkpoint": Regression.load_from_checkpoint,
    "fit": lambda path: trainer(path.parent, max_epochs=2).fit(Regression(), loader(), ckpt_path=path),
    "validate": lambda path: trainer(path.parent).validate(
        Regression(), loader(), ckpt_path=path, weights_only=True, verbose=False
    ),
}


SAID: dict[Callable[[Path], None], str] = {
    in_shards: r"sharded checkpoint, which this run's base strategy does not write|cannot be read as a sharded",
    of_deepspeed: r"was written by DeepSpeed, which alone reads it",
    in_the_trainer_state: r"is not what was written|holds more than tensors",
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("plant", [pickled_beside, *SAID])
def test_no_pickle_is_run(directory: Path, plant: Callable[[Path], None], way: str) -> None:
    plant(directory)
    if plant is pickled_beside or way == "load_adapter":
        WAYS[way](directory)  # it is an adapter, whatever lies beside it
    else:
        with pytest.raises(PEFTError, match=SAID[plant]):
            WAYS[way](directory)
    assert not (directory.parent / "ran").exists()


def test_what_lies_beside_an_adapter_changes_nothing(directory: Path) -> None:
    before = Regression.load_from_checkpoint(directory)
    pickled_beside(directory)
    assert_same(adapter_state(Regression.load_from_checkpoint(directory)), adapter_state(before))


@pytest.mark.parametrize("way", ["load_from_checkpoint", "fit", "validate"])
def test_shards_are_read_if_asked_for(sharded: Path, way: str) -> None:
    with pytest.raises(PEFTError, match=r"sharded checkpoint, which this run's .*weights_only=False"):
        WAYS[way](sharded)


def test_shards_hold_what_the_file_holds(trained: Path, sharded: Path) -> None:
    file = torch.load(trained / "file.ckpt", weights_only=True)
    for options in ({"sharded": True}, {"weights_only": False}):
        read = read_directory(sharded, **options)  # type: ignore[arg-type]
        assert_same(read["state_dict"], file["state_dict"])
        assert read["global_step"] == file["global_step"]
    loaded = Regression.load_from_checkpoint(sharded, weights_only=False)
    assert_same(adapter_state(loaded), file["state_dict"])


def described(directory: Path, change: Callable[[Any], Any]) -> None:
    """Change what ``.metadata`` says."""
    file = directory / ".metadata"
    content = pickle.loads(file.read_bytes())
    file.write_bytes(pickle.dumps(change(content) or content))


def too_large(content: Any) -> None:
    content.state_dict_metadata["model.huge"] = next(iter(content.state_dict_metadata.values()))
    content.state_dict_metadata["model.huge"].size = torch.Size([2**50])


def elsewhere(content: Any) -> None:
    next(iter(content.storage_data.values())).relative_path = "../directory/adapter_model.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: Ran(Path("/nowhere")), "names posix.mkdir"),
        (lambda content: {"a": 1}, "holds a dict"),
        (too_large, "lists .* bytes of tensors, the files have"),
        (elsewhere, "lies outside of it"),
    ],
)
@pytest.mark.parametrize("options", [{"sharded": True}, {"weights_only": False}])
def test_shards_are_read_without_a_pickle(
    sharded: Path, change: Callable[[Any], Any], message: str, options: dict[str, Any]
) -> None:
    described(sharded, change)
    with pytest.raises(PEFTError, match=message):
        read_directory(sharded, **options)


def test_weights_only_is_true_if_nothing_is_said(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning would unpickle what comes over http."""
    strategy, given = PEFTStrategy(LoRA(r=2)), []
    run = trainer(trained, strategy)
    monkeypatch.setattr(
        run.strategy.checkpoint_io, "load_checkpoint", lambda path, weights_only: given.append(weights_only) or {}
    )
    for weights_only in (None, True, False):
        run.strategy.load_checkpoint("https://example.com/file.ckpt", weights_only)
    assert given == [True, True, False]
