"""Adapters of every method as files, to be changed by hand or by chance, and loaded."""

import json
import shutil
import struct
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from families import build, outputs
from strangers import unsealed

from lightning_peft import (
    BEFT,
    IA3,
    OFT,
    AdaLoRA,
    Compacter,
    DoRA,
    LayerNormTuning,
    LoHa,
    LoKr,
    LoRA,
    LoReFT,
    MiSS,
    ParallelAdapter,
    PEFTError,
    PEFTMethod,
    PrefixTuning,
    PromptTuning,
    SeriesAdapter,
    VeRA,
    inject,
    load_adapter,
    save_adapter,
)

CONFIG, MARKER, TENSORS = "adapter_config.json", "lightning_peft.json", "adapter_model.safetensors"
METHODS: dict[str, PEFTMethod | list[PEFTMethod]] = {
    "lora": LoRA(r=2),
    "dora": DoRA(r=2),
    "series": SeriesAdapter(bottleneck=4),
    "parallel": ParallelAdapter(bottleneck=4),
    "compacter": Compacter(),
    "prompt": PromptTuning(num_virtual_tokens=3),
    "prefix": PrefixTuning(num_virtual_tokens=3),
    "ia3": IA3(),
    "vera": VeRA(r=2),
    "adalora": AdaLoRA(),
    "loha": LoHa(r=2),
    "lokr": LoKr(r=2),
    "oft": OFT(block_size=4),
    "miss": MiSS(r=4, mini_r=2),
    "beft": BEFT(),
    "loreft": LoReFT(r=2),
    "norms": LayerNormTuning(),
    "two": [LoRA(r=2, target_modules="attention"), SeriesAdapter(bottleneck=4, target_modules="mlp")],
}
DEEP: Any = 1
for _ in range(500):
    DEEP = [DEEP]
NASTY: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 7, 0.5, 1e308, -1e308, float("nan"), float("inf")),
    *(10**7, 10**9, 2**31, 2**63, 10**400, -(10**9)),
    *("", "x", "re:(", "re:(a+)+$", "re:(.*)*(.*)*(.*)*x", "../../etc/passwd", "/etc/passwd", "..", "\0", "\ud800"),
    *("os.system", "__class__", "a" * 5000, "re:" + "a" * 3000, "*" * 300, "all-linear", "lora", "prefix_tuning"),
    *([], [[]], {}, {"a": {}}, [None], [1, 2], ["x"] * 1000, {"": ""}, ["re:.*"], {"re:.*": 10**9}, {"x": "y"}, DEEP),
]


@cache
def seed(name: str) -> dict[str, bytes]:
    """Return the files of an adapter of this package's, by name."""
    directory, (model, _) = Path(mkdtemp()), build("llama")
    inject(model, METHODS[name])
    save_adapter(model, directory)
    files = {file.name: file.read_bytes() for file in unsealed(directory).iterdir()}
    shutil.rmtree(directory)
    return files


def written(directory: Path, files: dict[str, bytes]) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory


def changed(name: str, file: str, change: Callable[[Any], Any]) -> dict[str, bytes]:
    """Return the files of a seed with the JSON of one changed."""
    files = dict(seed(name))
    content = json.loads(files[file])
    made = change(content)
    files[file] = json.dumps(content if made is None else made).encode("utf-8", "surrogatepass")
    return files


def tried(directory: Path, files: dict[str, bytes]) -> bool:
    """Whether an adapter loads. If not, it is refused with words of ours, and the model is as it was; in any case soon.

    What the model then computes does not fail.
    """
    model, inputs = build("llama")
    before, began = list(model.state_dict()), time.process_time()
    path = written(directory, files)
    try:
        load_adapter(model, path)
    except PEFTError:
        assert list(model.state_dict()) == before
        return False
    finally:
        assert time.process_time() - began < 2
    with torch.no_grad():
        outputs(model, inputs)
    return True


def put(*path: Any, value: Any) -> Callable[[Any], None]:
    """Return a change that puts a value in a place."""

    def change(content: Any) -> None:
        for step in path[:-1]:
            content = content[step]
        content[path[-1]] = value

    return change


def header_changed(
    files: dict[str, bytes], change: Callable[[dict[str, Any]], Any], length: int | None = None
) -> dict[str, bytes]:
    raw = files[TENSORS]
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    change(header)
    made = json.dumps(header).encode()
    return {**files, TENSORS: struct.pack("<Q", len(made) if length is None else length) + made + raw[8 + size :]}
