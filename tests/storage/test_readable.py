"""What is no plain value is named when a checkpoint is written, and an intact file is never called damaged."""

import dataclasses
import enum
import functools
import os
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from modules import Regression, loader, trainer
from strangers import unsealed

from lightning_peft import LoRA, PEFTError
from lightning_peft.core.method import registered_methods
from lightning_peft.files.contents import read_torch
from lightning_peft.storage.checkpoint_directory import AdapterDirectory
from lightning_peft.storage.readable import is_whole


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Options:
    width: int = 3


class Given(Regression):
    """Saves what it is given."""

    def __init__(self, value: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()


OBJECTS = {
    "path": (Path("x"), r"PosixPath"),
    "scalar": (numpy.float32(1.0), r"multiarray\.scalar"),
    "enum": (Colour.RED, r"test_readable\.Colour"),
    "function": (os.path.join, r"posixpath\.join"),
    "dataclass": (Options(), r"test_readable\.Options"),
    "partial": (functools.partial(max, 1), r"functools\.partial"),
}
PLAIN = [1, 0.5, "a", None, True, (1, 2), [1], {"a": {1, 2}}, torch.ones(2), torch.float16]


def save(module: Any, path: Path, directory: bool, **options: Any) -> None:
    run = trainer(path.parent, **options)
    run.fit(module, loader())
    run.save_checkpoint(path, **({"storage_options": AdapterDirectory()} if directory else {}))


@pytest.mark.parametrize("directory", [True, False])
@pytest.mark.parametrize("kind", OBJECTS)
def test_an_object_is_named_when_it_is_written_and_when_it_is_read(tmp_path: Path, kind: str, directory: bool) -> None:
    value, name = OBJECTS[kind]
    with pytest.warns(UserWarning, match=rf"checkpoint\['hyper_parameters'\]\['value'\] \(.*{name}"):
        save(Given(value), tmp_path / "saved", directory)

    def resume(**options: Any) -> None:
        trainer(tmp_path, max_epochs=2).fit(Given(value), loader(), ckpt_path=tmp_path / "saved", **options)

    with pytest.raises(PEFTError, match=rf"{name}.*The file is whole.*weights_only=False") as caught:
        resume()
    assert "damaged" not in str(caught.value)
    resume(weights_only=False)
    assert type(Given.load_from_checkpoint(tmp_path / "saved", weights_only=False).hparams.value) is type(value)


@pytest.mark.parametrize("directory", [True, False])
def test_plain_values_and_methods_are_read_back(tmp_path: Path, directory: bool) -> None:
    value = [*PLAIN, LoRA(r=3, target_modules=["net.0"]), {"method": LoRA(alpha=2)}]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The checkpoint holds more")
        save(Given(value), tmp_path / "saved", directory)
    loaded = Given.load_from_checkpoint(tmp_path / "saved", weights_only=True)
    read = loaded.hparams.value
    assert torch.equal(read.pop(8), value.pop(8))
    assert read == value


@pytest.mark.parametrize("name", registered_methods())
def test_every_method_is_read_back(tmp_path: Path, name: str) -> None:
    method = registered_methods()[name]()
    torch.save(method, tmp_path / "method")
    assert torch.load(tmp_path / "method", weights_only=True) == method


def test_a_method_from_a_file_is_checked(tmp_path: Path) -> None:
    for wrong in ({"r": 0}, {"unknown": 1}):
        method = LoRA()
        vars(method).update(wrong)
        torch.save(method, tmp_path / "method")
        with pytest.raises(PEFTError, match=r"r=0|unknown"):
            torch.load(tmp_path / "method", weights_only=True)


def test_what_cannot_be_written_is_named_before_anything_is(tmp_path: Path) -> None:
    class Adding(Callback):
        def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            checkpoint["mine"] = {"function": lambda: 0}

    run = trainer(tmp_path, callbacks=[Adding()], enable_checkpointing=False)
    run.fit(Regression(), loader())
    for options in ({}, {"storage_options": AdapterDirectory()}):
        with pytest.raises(PEFTError, match=r"cannot be written to a checkpoint.*on_save_checkpoint"):
            run.save_checkpoint(tmp_path / "saved", **options)
    assert not (tmp_path / "saved").exists()


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def replaced(file: Path) -> None:
    file.write_text("no checkpoint")


@pytest.mark.parametrize("directory", [True, False])
@pytest.mark.parametrize("damage", [cut_off, emptied, replaced])
def test_a_damaged_file_is_called_so(tmp_path: Path, damage: Callable[[Path], None], directory: bool) -> None:
    save(Regression(), tmp_path / "saved", directory)
    damage(unsealed(tmp_path / "saved") / "trainer_state.ckpt" if directory else tmp_path / "saved")
    with pytest.raises(PEFTError, match=r"saved.* is damaged or truncated"):
        trainer(tmp_path, max_epochs=2).fit(Regression(), loader(), ckpt_path=tmp_path / "saved")


def with_pickle(file: Path, instructions: bytes) -> None:
    """Put a pickle into a file of ``torch.save``, with the right checksum."""
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, instructions if name.endswith("data.pkl") else content)


@pytest.mark.parametrize(
    "instructions",
    [b"\x80\x02hc.", b"\x80\x02R.", b"\x80\x02}]]s.", b"\x80\x02X\x01\x00\x00\x00\xff.", b"\x80\x02"],
    ids=["no such memo", "empty stack", "unhashable key", "not UTF-8", "no end"],
)
def test_a_pickle_that_makes_no_sense_is_damage(tmp_path: Path, instructions: bytes) -> None:
    save(Regression(), tmp_path / "saved.ckpt", directory=False)
    with_pickle(tmp_path / "saved.ckpt", instructions)
    with pytest.raises(PEFTError, match=r"saved.* is damaged or truncated"):
        trainer(tmp_path, max_epochs=2).fit(Regression(), loader(), ckpt_path=tmp_path / "saved.ckpt")
    with pytest.raises(PEFTError, match=r"saved.* is damaged or truncated"):
        Regression.load_from_checkpoint(tmp_path / "saved.ckpt")
    with pytest.raises(PEFTError, match="cannot be read as tensors"):
        read_torch(tmp_path / "saved.ckpt")


@pytest.mark.parametrize("length", [9, 100])
def test_a_module_is_not_made_of_a_file_that_is_cut_off(tmp_path: Path, length: int) -> None:
    save(Regression(), tmp_path / "saved.ckpt", directory=False)
    (tmp_path / "saved.ckpt").write_bytes((tmp_path / "saved.ckpt").read_bytes()[:-length])
    with pytest.raises(PEFTError, match=r"saved.* is damaged or truncated"):
        Regression.load_from_checkpoint(tmp_path / "saved.ckpt")


SIZES, COMPRESSION = slice(20, 28), slice(10, 12)
"""Of an entry of a zip file's directory: how many bytes a record has, and how it is packed."""


@pytest.mark.parametrize(("field", "value"), [(SIZES, b"\xff\xff\xff\x00" * 2), (COMPRESSION, b"\x0c\x00")])
def test_a_directory_of_records_that_is_wrong_is_damage(tmp_path: Path, field: slice, value: bytes) -> None:
    file = tmp_path / "saved.ckpt"
    save(Regression(), file, directory=False)
    content = bytearray(file.read_bytes())
    entry = content.rindex(b"PK\x01\x02")
    content[entry + field.start : entry + field.stop] = value
    file.write_bytes(content)
    assert not is_whole(file)
    with pytest.raises(PEFTError, match=r"saved.* is damaged"):
        Regression.load_from_checkpoint(file)


@pytest.mark.parametrize("change", ["state", "tensor", "base", "sample"])
def test_entries_of_other_kinds_are_damage(tmp_path: Path, change: str) -> None:
    save(Regression(), tmp_path / "saved.ckpt", directory=False)
    content = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    (injection,) = content["lightning_peft"]["injections"].values()
    if change == "state":
        content["state_dict"] = 5
    elif change == "tensor":
        content["state_dict"][next(iter(content["state_dict"]))] = 5
    elif change == "base":
        injection["base"] = [1]
    else:
        samples = injection["base"]["samples"]
        samples[next(iter(samples))] = [None]
    torch.save(content, tmp_path / "saved.ckpt")
    with pytest.raises(PEFTError, match=r"damaged|was expected"):
        Regression.load_from_checkpoint(tmp_path / "saved.ckpt")
    with pytest.raises(PEFTError, match=r"damaged|was expected"):
        trainer(tmp_path, max_epochs=2).fit(Regression(), loader(), ckpt_path=tmp_path / "saved.ckpt")
