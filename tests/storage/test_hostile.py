"""Files that somebody made to do harm, or that were damaged: refused, or loaded as what they say, and soon."""

import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from families import build
from hostile import CONFIG, DEEP, MARKER, TENSORS, changed, header_changed, put, seed, tried, written
from safetensors.torch import load_file, save_file

from lightning_peft import PEFTError, load_adapter
from lightning_peft.core.method import method_from_config
from lightning_peft.core.schema import fits
from lightning_peft.files.contents import write_tensors
from lightning_peft.storage.checkpoint_directory import refuse_remote

MANY = {f"re:a{i}.*": 1 for i in range(20_000)}
SLOW = [f"re:(.*a?){{{i}}}x" for i in range(9, 30)]

# What was found by chance, and ended in another error, took minutes or gigabytes.
CORPUS: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
    "samples that are words": ("series", MARKER, put("base", "samples", value={"model.layers.0.mlp.up_proj": ["x"]})),
    "a sample without a length": ("parallel", MARKER, put("base", "samples", value={"a": 1.5})),
    "samples in a list": ("lora", MARKER, put("base", "samples", value=[])),
    "a sample of 400 digits": ("norms", MARKER, put("base", "samples", value={"a": [10**400]})),
    "a base that is a list": ("lora", MARKER, put("base", value=[1])),
    "parts that are a number": ("lora", MARKER, put("parts", value=3)),
    "a part outside": ("lora", MARKER, put("parts", value=["../x"])),
    "a bottleneck in a list": ("two", CONFIG, put("methods", 1, "bottleneck", value=[4])),
    "a dropout in a list": ("two", CONFIG, put("methods", 1, "dropout", value=[0.1])),
    "layers that are words": ("series", CONFIG, put("methods", 0, "layers", value=["x"])),
    "targets that are a number": ("series", CONFIG, put("methods", 0, "target_modules", value=3)),
    "endings that are a number": ("ia3", CONFIG, put("modules_to_save", value=3)),
    "d_initial in an object": ("vera", CONFIG, put("d_initial", value={"a": 1})),
    "a dropout that is a word": ("two", CONFIG, put("methods", 0, "dropout", value="x")),
    "placements in a list": ("series", CONFIG, put("methods", 0, "placement", value=[["mlp"]])),
    "an activation in a list": ("parallel", CONFIG, put("methods", 0, "activation", value=["relu"])),
    "a preset in a list": ("series", CONFIG, put("methods", 0, "preset", value=["houlsby"])),
    "ranks that are a number": ("two", CONFIG, put("methods", 0, "rank_pattern", value=3)),
    "n in an object": ("compacter", CONFIG, put("methods", 0, "n", value={})),
    "a method in a list": ("series", CONFIG, put("methods", 0, "method", value=["lora"])),
    "ten million virtual ranks": ("two", CONFIG, put("methods", 0, "r", value=10**7)),
    "a bottleneck of ten million": ("series", CONFIG, put("methods", 0, "bottleneck", value=10**7)),
    "a billion singular values": ("adalora", CONFIG, put("init_r", value=10**9)),
    "a projection of ten million": ("vera", CONFIG, put("r", value=10**7)),
    "a rank of 400 digits": ("lora", CONFIG, put("r", value=10**400)),
    "20,000 patterns of alpha": ("lora", CONFIG, put("alpha_pattern", value={f"a{i}.*": 1.0 for i in range(20_000)})),
    "20,000 patterns of ranks": ("two", CONFIG, put("methods", 0, "rank_pattern", value=MANY)),
    "slow patterns": ("two", CONFIG, put("methods", 0, "target_modules", value=SLOW)),
    "a hundred thousand targets": ("series", CONFIG, put("methods", 0, "target_modules", value=["mlp"] * 100_000)),
    "d_initial of nothing": ("vera", CONFIG, put("d_initial", value=None)),
    "a dropout of nothing": ("adalora", CONFIG, put("lora_dropout", value=None)),
    "an alpha that float32 has not": ("adalora", CONFIG, put("lora_alpha", value=5e265)),
    "a ratio that float32 has not": ("two", CONFIG, put("methods", 0, "alpha", value=1e39)),
    "a model that is trained whole beside": ("series", CONFIG, put("train_also", value=[""])),
    "deep lists": ("lora", CONFIG, put("lora_alpha", value=DEEP)),
}  # fmt: skip


@pytest.mark.parametrize("case", CORPUS)
def test_what_was_found_is_refused(case: str, tmp_path: Path) -> None:
    name, file, change = CORPUS[case]
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert not tried(tmp_path / "it", changed(name, file, change)) or case == "a hundred thousand targets"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most < 500 * 1024


def with_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, bytes]:
    """Return the files of a seed, with one tensor changed."""
    directory, files = Path(mkdtemp()), dict(seed(name))
    path = written(directory, files) / TENSORS
    tensors = load_file(path)
    key = min(tensors)
    save_file({**tensors, key: change(tensors[key]).contiguous()}, path)
    files[TENSORS] = path.read_bytes()
    shutil.rmtree(directory)
    return files


@pytest.mark.parametrize("kind", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_tensors_of_other_kinds_are_refused(kind: torch.dtype, tmp_path: Path) -> None:
    model, _ = build("llama")
    written(tmp_path / "it", with_tensor("lora", lambda tensor: tensor.to(kind)))
    with pytest.raises(PEFTError, match=r"has the dtype|is damaged"):
        load_adapter(model, tmp_path / "it")


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="this torch does not have them")
def test_two_values_in_one_element_are_refused(tmp_path: Path) -> None:
    packed = with_tensor("lora", lambda t: torch.zeros(t.shape, dtype=torch.uint8).view(torch.float4_e2m1fn_x2))
    with pytest.raises(PEFTError, match="has the dtype"):
        load_adapter(build("llama")[0], written(tmp_path / "it", packed))


def test_values_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    files = with_tensor("lora", lambda tensor: tensor.double().fill_(1e300))
    model, _ = build("llama")
    with pytest.raises(PEFTError, match=r"values that torch\.float32 cannot hold"):
        load_adapter(model, written(tmp_path / "it", files))
    halves = with_tensor("lora", lambda tensor: tensor.half())
    assert tried(tmp_path / "it", halves)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    files = dict(seed("lora"))
    files[CONFIG] = files[CONFIG].replace(b'"r": 2', b'"r": 2, "r": 3')
    model, _ = build("llama")
    with pytest.raises(PEFTError, match="'r' stands twice"):
        load_adapter(model, written(tmp_path / "it", files))


@pytest.mark.parametrize("file", [CONFIG, MARKER, TENSORS])
def test_links_that_leave_the_directory_are_refused(file: str, tmp_path: Path) -> None:
    for name in ("it", "elsewhere"):
        written(tmp_path / name, seed("lora"))
    (tmp_path / "it" / file).unlink()
    os.symlink(tmp_path / "elsewhere" / file, tmp_path / "it" / file)
    model, _ = build("llama")
    with pytest.raises(PEFTError, match="outside of its directory"):
        load_adapter(model, tmp_path / "it")


def test_a_link_in_the_older_format_is_refused_too(tmp_path: Path) -> None:
    directory = written(tmp_path / "it", seed("lora"))
    torch.save(load_file(directory / TENSORS), tmp_path / "elsewhere.bin")
    (directory / TENSORS).unlink()
    os.symlink(tmp_path / "elsewhere.bin", (directory / TENSORS).with_suffix(".bin"))
    with pytest.raises(PEFTError, match="outside of its directory"):
        load_adapter(build("llama")[0], directory)


def test_a_folder_that_safetensors_could_not_read_is_refused(tmp_path: Path) -> None:
    """It writes there, though, so that a run would end in checkpoints that nothing reads."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/n\xff"))
    folder.mkdir()
    written(folder / "it", seed("lora"))
    for act in (
        lambda: load_adapter(build("llama")[0], folder / "it"),
        lambda: write_tensors(folder / "new.safetensors", {"a": torch.ones(1)}),
        lambda: refuse_remote(folder),
    ):
        with pytest.raises(PEFTError, match="is not UTF-8"):
            act()


def test_the_hub_s_cache_and_links_to_directories_are_read(tmp_path: Path) -> None:
    """``snapshots/REVISION/FILE`` is a link to ``blobs/HASH``; ``last`` may be one to a checkpoint."""
    snapshot = written(tmp_path / "snapshots" / "0", seed("lora"))
    (tmp_path / "blobs").mkdir()
    for file in list(snapshot.iterdir()):
        shutil.move(file, tmp_path / "blobs" / file.name)
        os.symlink(Path("../../blobs") / file.name, file)
    os.symlink(snapshot, tmp_path / "last")
    for place in (snapshot, tmp_path / "last"):
        load_adapter(build("llama")[0], place)


@pytest.mark.parametrize("length", [0, 1, 2**63, 2**64 - 1, 10**9])
def test_headers_of_absurd_lengths_are_refused(length: int, tmp_path: Path) -> None:
    assert not tried(tmp_path / "it", header_changed(seed("lora"), lambda header: None, length))


def test_a_schema() -> None:
    for value, hint, right in (
        (1, int, True),
        (True, int, False),
        (2**63, int, False),
        (1, float, True),
        (float("nan"), float, False),
        (None, int | None, True),
        (["a"], list[str] | str, True),
        ([1], list[str] | str, False),
        ({"a": 1}, dict[str, int], True),
        ({"a": "b"}, dict[str, int], False),
        ([{}], list[dict[str, Any]], True),
    ):
        assert fits(value, hint) is right, (value, hint)
    with pytest.raises(PEFTError, match=r"method 'lora' has r='8'; int was expected"):
        method_from_config({"method": "lora", "r": "8"})


@pytest.mark.parametrize("name", ["lora", "ia3", "adalora", "vera", "loha"])
def test_a_tensor_that_is_named_as_a_piece_is_refused(name: str, tmp_path: Path) -> None:
    def rename(header: dict[str, Any]) -> None:
        last = max(header.keys() - {"__metadata__"})
        header[f"{last}#0:0:9"] = header.pop(last)

    assert not tried(tmp_path / "it", header_changed(seed(name), rename))


@pytest.mark.parametrize("name", ["lora", "ia3", "adalora", "vera", "loha", "norms"])
def test_a_tensor_with_another_prefix_is_refused(name: str, tmp_path: Path) -> None:
    """One letter of a name is another, in what is cut off it."""

    def rename(header: dict[str, Any]) -> None:
        last = max(key for key in header if key.startswith("base_model.model."))
        header[last.replace("_model.model.", "_model.modJl.", 1)] = header.pop(last)

    assert not tried(tmp_path / "it", header_changed(seed(name), rename))
