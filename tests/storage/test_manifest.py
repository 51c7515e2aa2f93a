"""What was written is told from what is there: a flipped bit, a missing or swapped file is named."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import peft
import pytest
import torch
from families import build, outputs, randomise
from lightning.pytorch.callbacks import ModelCheckpoint
from modules import Regression, adapter_state, assert_same, loader, trainer

from lightning_peft import LoRA, PEFTError, inject, load_adapter, save_adapter
from lightning_peft.callbacks import AdapterCheckpoint
from lightning_peft.files.manifest import MANIFEST
from lightning_peft.storage.checkpoint_directory import read_directory
from lightning_peft.storage.readable import is_whole

ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "lightning_peft.json")
FILES = (*ADAPTER, "trainer_state.ckpt")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's checkpoints of steps 2 and 4, as directories and as files."""
    root = tmp_path_factory.mktemp("run")
    savers = [kind(root, save_top_k=-1, every_n_train_steps=2) for kind in (AdapterCheckpoint, ModelCheckpoint)]
    for saver, name in zip(savers, ("{step}", "file-{step}"), strict=True):
        saver.filename = name
    trainer(root, callbacks=savers).fit(Regression(), loader())
    return root


@pytest.fixture
def directory(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run / "step=4", tmp_path / "directory"))


def flipped_bits(file: Path, count: int) -> Iterator[None]:
    """Flip one bit after another, from the first byte to the last, each for the time of an iteration."""
    content = file.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for place in torch.linspace(0, len(content) - 1, count).long().tolist():
        changed = bytearray(content)
        changed[place] ^= 1 << int(torch.randint(8, (), generator=generator))
        file.write_bytes(changed)
        yield
    file.write_bytes(content)


READERS: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "load_adapter": (lambda path: load_adapter(Regression(), path), ADAPTER),
    "resume": (read_directory, FILES),
    "load_from_checkpoint": (Regression.load_from_checkpoint, FILES),
}


@pytest.mark.parametrize(("reader", "file"), [(r, f) for r, (_, files) in READERS.items() for f in files])
def test_a_flipped_bit_is_found_and_the_file_named(directory: Path, reader: str, file: str) -> None:
    for _ in flipped_bits(directory / file, 20):
        with pytest.raises(PEFTError, match=rf"{file} has another content.*at step 4.*Take another copy"):
            READERS[reader][0](directory)
        assert not is_whole(directory)
    READERS[reader][0](directory)


@pytest.mark.parametrize("file", FILES)
def test_a_file_of_another_step_or_a_missing_one_is_named(run: Path, directory: Path, file: str) -> None:
    if (run / "step=2" / file).read_bytes() != (directory / file).read_bytes():
        shutil.copy(run / "step=2" / file, directory / file)
        with pytest.raises(PEFTError, match=rf"{file} has .*at step 4"):
            read_directory(directory)
    (directory / file).unlink()
    with pytest.raises(PEFTError, match=rf"{file} is missing|holds no {file}"):
        read_directory(directory)


def test_a_trained_head_that_was_added_is_named(directory: Path) -> None:
    (directory / "trained_whole.safetensors").write_bytes((directory / "adapter_model.safetensors").read_bytes())
    with pytest.raises(PEFTError, match=r"trained_whole\.safetensors was added since, and would be read"):
        load_adapter(Regression(), directory)


def test_what_users_do_with_a_directory_is_not_damage(directory: Path, tmp_path: Path) -> None:
    expected = read_directory(directory)["state_dict"]
    (directory / "README.md").write_text("My adapter.")
    (directory / "README.md").write_text("My adapter, and how it came about.")
    shutil.copytree(shutil.copytree(directory, tmp_path / "copy"), directory / "runs" / "copy")
    directory.rename(tmp_path / "renamed")
    shutil.copytree(tmp_path / "renamed", tmp_path / "copied")
    (tmp_path / "link").symlink_to("copied")
    for place in ("renamed", "copied", "link", "renamed/runs/copy"):
        assert_same(read_directory(tmp_path / place)["state_dict"], expected)
        load_adapter(Regression(), tmp_path / place)
    # To publish an adapter, what is needed to resume is left out; or all but what HF PEFT reads.
    (tmp_path / "copied" / "trainer_state.ckpt").unlink()
    load_adapter(Regression(), tmp_path / "copied")
    for file in ("lightning_peft.json", MANIFEST):
        (tmp_path / "copied" / file).unlink()
    load_adapter(Regression().net, tmp_path / "copied")


def test_without_a_manifest_a_directory_is_read_as_it_is(directory: Path) -> None:
    (directory / MANIFEST).unlink()
    config = directory / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 1}))
    load_adapter(Regression(), directory)
    assert is_whole(directory)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"version": 2, "files": {}}', '{"version": 1, "files": []}'])
def test_a_manifest_that_says_nothing_is_damaged(directory: Path, content: str) -> None:
    (directory / MANIFEST).write_text(content)
    with pytest.raises(PEFTError, match=MANIFEST):
        load_adapter(Regression(), directory)


def test_a_manifest_names_no_file_outside(directory: Path) -> None:
    content = json.loads((directory / MANIFEST).read_text())
    content["files"]["../secret"] = {"bytes": 1, "sha256": ""}
    (directory / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(PEFTError, match=r"outside of it"):
        load_adapter(Regression(), directory)


def test_it_says_what_the_directory_is(directory: Path) -> None:
    content = json.loads((directory / MANIFEST).read_text())
    assert content["step"] == 4
    assert content["methods"] == {"": {"default": ["lora"]}}
    assert content["base"] == {"": {"class": "Regression", "name_or_path": ""}}
    assert torch.__version__.startswith(content["versions"]["torch"])  # which may name a build beside
    assert content["files"].keys() == set(FILES)


def test_a_directory_of_several_adapters_is_checked_as_a_whole_and_in_parts(tmp_path: Path) -> None:
    model = Regression()
    for name in ("default", "second"):
        inject(model, LoRA(r=2), name=name)
    saver = AdapterCheckpoint(tmp_path, filename="saved")
    trainer(tmp_path, callbacks=[saver]).fit(model, loader())
    second = tmp_path / "saved" / "second"
    load_adapter(Regression(), second)
    for _ in flipped_bits(second / "adapter_model.safetensors", 3):
        for reader in (read_directory, lambda path: load_adapter(Regression(), path / "second")):
            with pytest.raises(PEFTError, match=r"second/adapter_model\.safetensors has another content"):
                reader(tmp_path / "saved")


def test_hf_peft_reads_a_directory_with_a_manifest(tmp_path: Path) -> None:
    model, inputs = build("llama")
    inject(model, LoRA(r=2))
    randomise(model)
    save_adapter(model, tmp_path / "adapter")
    assert (tmp_path / "adapter" / MANIFEST).is_file()
    theirs = peft.PeftModel.from_pretrained(build("llama")[0], tmp_path / "adapter")
    assert (outputs(theirs, inputs) - outputs(model, inputs)).abs().max() <= 1e-5


@pytest.mark.parametrize("way", ["resume", "load_from_checkpoint"])
def test_a_bit_of_a_file_that_changes_what_is_read_is_found(run: Path, tmp_path: Path, way: str) -> None:
    """Of a zip file some bits mean nothing: its times, its padding. With those flipped the same is read."""
    file = Path(shutil.copy(run / "file-step=4.ckpt", tmp_path))
    read: Callable[[Path], Any] = {
        "resume": lambda path: trainer(tmp_path).strategy.load_checkpoint(path)["state_dict"],
        "load_from_checkpoint": lambda path: adapter_state(Regression.load_from_checkpoint(path, weights_only=True)),
    }[way]
    expected, found = read(file), 0
    for _ in flipped_bits(file, 150):
        try:
            state = read(file)
        except (PEFTError, RuntimeError, UnpicklingError):  # the others, if it is no zip file any more
            found += 1
        else:
            assert_same(state, expected)
    assert found > 50


def test_a_file_without_checksums_is_read(run: Path, tmp_path: Path) -> None:
    content = torch.load(run / "file-step=4.ckpt", weights_only=True)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, tmp_path / "file.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert is_whole(tmp_path / "file.ckpt")
    assert_same(trainer(tmp_path).strategy.load_checkpoint(tmp_path / "file.ckpt")["state_dict"], content["state_dict"])
